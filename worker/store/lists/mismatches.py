"""Orgs whose provider returns the token of another org or client; every query is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, Select, func, select, union

from worker.ids import Scope
from worker.store import tables
from worker.store.dialect import all_rows, in_scope

# Reasons of refused runs that say so.
REASONS = ("org_mismatch", "client_mismatch")
# The newest refused runs that are read, and the definitions that fail: other orgs' trouble fills one of them
# only if it is in many runs, the other only if it is in many definitions.
NEWEST = 2_000
FAILING = 1_000
# Orgs that are listed, and the newest runs of each that may show that its tokens are right again.
ORGS = 200
LATER = 100

_ends, _failing = tables.run_ends, tables.failing_definitions
_runs, _orgs = tables.runs, tables.orgs


class Mismatch(NamedTuple):
    """Runs refused with this reason and detail, and their orgs, those refused last first."""

    reason: str
    detail: str
    orgs: Sequence[str]
    runs: int
    first_at: datetime
    last_at: datetime


def mismatches(connection: Connection, scope: Scope, since: datetime) -> list[Mismatch]:
    """What was refused since then for orgs of which no later run has succeeded, the latest first.

    At most ORGS orgs. `runs` and `first_at` are of the runs that were read.
    """
    read = union(_newest(scope, since), _failing_now(scope)).subquery("read")
    last_at = func.max(_runs.c.finished_at)
    columns = (_runs.c.org_id, _runs.c.reason, _runs.c.detail)
    refused = (
        select(
            *columns,
            func.count().label("runs"),
            func.min(_runs.c.finished_at).label("first_at"),
            last_at.label("last_at"),
        )
        .select_from(read)
        .join(_runs, _runs.c.id == read.c.run_id)
        .where(_runs.c.state == "refused", _runs.c.finished_at >= since)
        .group_by(*columns)
        .order_by(last_at.desc())
        .limit(ORGS)
        .subquery("refused")
    )
    newest = (
        select(_runs.c.state, _runs.c.started_at)
        .where(_runs.c.org_id == refused.c.org_id)
        .order_by(_runs.c.id.desc())
        .limit(LATER)
        .correlate(refused)
        .subquery("newest")
    )
    works = (
        select(newest.c.state)
        # An attempt that began earlier may have had an earlier token.
        .where(newest.c.state == "succeeded", newest.c.started_at > refused.c.last_at)
        .correlate(refused)
        .exists()
    )
    query = (
        select(
            _orgs.c.code,
            *(refused.c[name] for name in ("reason", "detail", "runs", "first_at", "last_at")),
        )
        .select_from(refused)
        .join(_orgs, _orgs.c.id == refused.c.org_id)
        .where(_orgs.c.state != "removed", ~works)
        .order_by(refused.c.last_at.desc(), _orgs.c.code)
        .limit(ORGS)
    )
    found: dict[tuple[str, str], Mismatch] = {}
    for row in all_rows(connection, query):
        key = row["reason"], row["detail"] or ""
        before = found.get(key, Mismatch(*key, (), 0, row["first_at"], row["last_at"]))
        found[key] = before._replace(
            orgs=(*before.orgs, row["code"]),
            runs=before.runs + row["runs"],
            first_at=min(before.first_at, row["first_at"]),
        )
    return list(found.values())


# Each reads the reason of a run by its key: for a join, PostgreSQL may read all runs.
def _newest(scope: Scope, since: datetime) -> Select[tuple[str]]:
    """The newest refused runs, those of such a reason."""
    some = (
        select(_ends.c.run_id)
        .where(_ends.c.state == "refused", _ends.c.finished_at >= since)
        .where(*in_scope(_ends.c.org_id, scope))
        .order_by(_ends.c.finished_at.desc())
        .limit(NEWEST)
        .subquery()
    )
    reason = select(_runs.c.reason).where(_runs.c.id == some.c.run_id).limit(1).scalar_subquery()
    each = select(some.c.run_id, reason.label("reason")).subquery()
    return select(each.c.run_id).where(each.c.reason.in_(REASONS))


def _failing_now(scope: Scope) -> Select[tuple[str]]:
    """The runs that failed last of the newest definitions that fail, those of such a reason."""
    # From the index alone, in its order.
    some = (
        select(_failing.c.definition_id)
        .where(*in_scope(_failing.c.org_id, scope))
        .order_by(_failing.c.definition_id.desc())
        .limit(FAILING)
        .subquery()
    )
    one = _failing.alias()
    reason = (
        select(_runs.c.reason)
        .select_from(one)
        .join(_runs, _runs.c.id == one.c.run_id)
        .where(one.c.definition_id == some.c.definition_id)
        .limit(1)
        .scalar_subquery()
    )
    each = select(some.c.definition_id, reason.label("reason")).subquery()
    return (
        select(_failing.c.run_id)
        .select_from(each)
        .join(_failing, _failing.c.definition_id == each.c.definition_id)
        .where(each.c.reason.in_(REASONS))
    )
