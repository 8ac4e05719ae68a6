"""Failed and refused runs by cause; orgs whose provider returns the token of another org or client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypedDict, cast

from sqlalchemy import ColumnElement, Connection, Select, Text, case, func, literal, select, union
from sqlalchemy import cast as sql_cast

from worker.ids import Scope
from worker.store import tables
from worker.store.dialect import all_rows, in_scope
from worker.store.lists.morning import NAMED, codes_of

# The newest ended runs that are read: about 20 ms. A broken release fails a hundred times a second.
MAX_RUNS = 2_000
# Causes that are shown.
CAUSES = 50
# Characters of a cause that a search looks for.
MAX_CAUSE = 120
# Reasons of runs that are refused because their provider mixed up orgs or clients.
REASONS = ("org_mismatch", "client_mismatch")
# The newest refused runs that are read, and the definitions that fail: other orgs' trouble fills one of them
# only if it is in many runs, the other only if it is in many definitions.
NEWEST = 2_000
FAILING = 1_000
# Orgs that are listed, and the newest runs of each that may show that its tokens are right again.
ORGS = 200
LATER = 100

_ends, _runs, _attempts, _orgs = tables.run_ends, tables.runs, tables.attempts, tables.orgs
_failing = tables.failing_definitions


class Cause(TypedDict):
    """Failures with the same error, numbers and quoted texts aside.

    `open_runs` are those without a retry, in `open_orgs` orgs, of which `named` are those with most of them;
    `run` is the newest run, and `message` its error as it was.
    """

    state: str
    reason: str
    cause: str
    runs: int
    orgs: int
    open_runs: int
    open_orgs: int
    named: list[str]
    first_at: datetime
    last_at: datetime
    run: str
    message: str


def by_cause(connection: Connection, scope: Scope, state: str, since: datetime) -> tuple[list[Cause], bool]:
    """The causes of runs that ended in this state since then, most open runs first.

    Only the newest MAX_RUNS runs are read; the second value says whether there may be more.
    """
    newest = (
        select(_ends.c.run_id, _ends.c.org_id, _ends.c.finished_at)
        .where(_ends.c.state == state, _ends.c.finished_at >= since, *in_scope(_ends.c.org_id, scope))
        .order_by(_ends.c.finished_at.desc())
        .limit(MAX_RUNS)
        .subquery("newest")
    )
    retry = _runs.alias("retry")
    is_retried = select(retry.c.id).where(retry.c.retry_of == newest.c.run_id).exists()
    each = (
        select(
            newest.c.run_id,
            newest.c.org_id,
            newest.c.finished_at,
            func.coalesce(_runs.c.reason, literal("error")).label("reason"),
            _cause().label("cause"),
            case((is_retried, None), else_=newest.c.org_id).label("open_org"),
        )
        .select_from(newest)
        .join(_runs, _runs.c.id == newest.c.run_id)
        .subquery("each")
    )
    rows = func.count(each.c.run_id)
    open_runs = func.count(each.c.open_org)
    query = (
        select(
            literal(state).label("state"),
            each.c.reason,
            each.c.cause,
            rows.label("runs"),
            func.count(each.c.org_id.distinct()).label("orgs"),
            open_runs.label("open_runs"),
            func.count(each.c.open_org.distinct()).label("open_orgs"),
            # At most MAX_RUNS ids, in all causes.
            func.aggregate_strings(sql_cast(each.c.open_org, Text), ",").label("named"),
            func.min(each.c.finished_at).label("first_at"),
            func.max(each.c.finished_at).label("last_at"),
            # Ids sort by creation. PostgreSQL has no max(uuid) before version 18.
            func.max(sql_cast(each.c.run_id, Text)).label("run"),
        )
        .group_by(each.c.reason, each.c.cause)
        .order_by(open_runs.desc(), rows.desc(), each.c.cause)
        .limit(CAUSES)
    )
    rows_found = all_rows(connection, query)
    messages = _messages(connection, [row["run"] for row in rows_found])
    named = _named(connection, [row["named"] or "" for row in rows_found])
    found = cast(
        list[Cause],
        [
            {**row, "named": names, "message": messages.get(str(row["run"])) or row["cause"]}
            for row, names in zip(rows_found, named, strict=True)
        ],
    )
    size = connection.execute(select(func.count()).select_from(newest)).scalar_one() if found else 0
    return found, size == MAX_RUNS


def _named(connection: Connection, joined: Sequence[str]) -> list[list[str]]:
    """Of each text of ids of orgs, the codes of those that are in it most often."""
    ids = [
        # The first of those that are equally often in it is the oldest org.
        [org for org, _ in Counter(sorted(text.split(","))).most_common(NAMED)] if text else []
        for text in joined
    ]
    codes = codes_of(connection, {org for few in ids for org in few})
    return [[codes[org] for org in few if org in codes] for few in ids]


def _messages(connection: Connection, runs: Sequence[str]) -> dict[str, str]:
    """The error of each run's last attempt, if it has one."""
    if not runs:
        return {}
    query = (
        select(_runs.c.id, _attempts.c.error)
        .join(_attempts, (_attempts.c.run_id == _runs.c.id) & (_attempts.c.attempt == _runs.c.attempt))
        .where(_runs.c.id.in_(runs), _attempts.c.error.is_not(None))
        .limit(CAUSES)
    )
    return {
        str(row["id"]): f"{row['error'].get('type', 'error')}: {row['error'].get('message', '')}"
        for row in all_rows(connection, query)
    }


def _cause() -> ColumnElement[Any]:
    """The error of the last attempt without what varies; else why the run ended, and its detail."""
    # By its key: as a join, PostgreSQL would read all attempts.
    of_attempt = (
        select(_attempts.c.error_cause)
        .where(_attempts.c.run_id == _runs.c.id, _attempts.c.attempt == _runs.c.attempt)
        .limit(1)
        .scalar_subquery()
    )
    detail = func.coalesce(literal(": ") + _runs.c.detail, literal(""))
    return func.coalesce(of_attempt, func.coalesce(_runs.c.reason, literal("error")) + detail)


def cause_text(cause: Cause) -> str:
    """The text of the search for the runs of a cause, from the day before its first one."""
    since = cause["first_at"] - timedelta(days=1)
    begin = f"state:{cause['state']} since:{since:%Y-%m-%d}"
    # Without an error the cause is the reason and its detail.
    if cause["cause"].partition(": ")[0] == cause["reason"]:
        return f"{begin} reason:{cause['reason']}"
    return f"{begin} {cause_term(cause['cause'])}"


def cause_term(cause: str) -> str:
    """The term of a search for the runs that failed with a cause."""
    return f'cause:"{cause_part(cause)}"'


def cause_part(cause: str) -> str:
    """The value of `cause:` for it."""
    # A quoted value ends at the next quote: the longest part without one finds the same runs.
    return max(cause.split('"'), key=len).strip()[:MAX_CAUSE]


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
