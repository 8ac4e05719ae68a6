"""What pages of orgs and definitions show: the days of an org, revisions and lengths, what is broken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Annotated, Any, TypedDict, cast

from sqlalchemy import ColumnElement, Connection, Text, case, func, literal_column, null, select, text
from sqlalchemy import cast as sql_cast

from worker.ids import DefinitionId, OrgId, OrgScope, RunId, Scope, lowest_id
from worker.store import failing, orgs, redaction, tables
from worker.store.dialect import Id, all_rows, below, in_scope, is_postgresql, rows_as
from worker.store.lists import DEFAULT_LIMIT, FIRST_PAGE, Page
from worker.store.lists import runs as run_lists
from worker.store.lists.rows import Run
from worker.store.redaction import Shown, Spec

DAYS = 30
# The newest runs that are read: about 20 ms.
MAX_RUNS = 5_000
MAX_SKIPS = 1_000
# States of a day in words, the one that matters most first. `retried`: failed, then its retry succeeded.
STATES: Mapping[str, str] = {
    "failed": "failed",
    "refused": "refused",
    "waiting": "unfinished",
    "retried": "retried",
    "cancelled": "cancelled",
    "skipped": "skipped",
    "succeeded": "succeeded",
}

_failing, _credentials, _orgs = tables.failing_definitions, tables.credentials, tables.orgs
_runs, _skips, _live = tables.runs, tables.skips, tables.live_runs
_definitions, _revisions, _open = tables.definitions, tables.definition_revisions, tables.waits


@dataclass(frozen=True, slots=True)
class Grid:
    """The days, oldest first, and the counts by state of each definition on each day.

    `since` is the time from which it is complete, if there are too many runs for all days. On the days
    `uncounted` some scheduled times were skipped, of a range of days that is only counted as a whole.
    """

    days: Sequence[date]
    cells: Mapping[tuple[str, date], Mapping[str, int]] = field(default_factory=dict)
    since: datetime | None = None
    uncounted: Collection[tuple[str, date]] = ()

    def of(self, definition_id: str, day: date) -> Mapping[str, int]:
        """Runs and skips by state; empty if nothing was due."""
        return self.cells.get((definition_id, day), {})

    def worst(self, definition_id: str, day: date) -> str:
        """The state that matters most, or an empty text."""
        counts = self.of(definition_id, day)
        return next((state for state in STATES if counts.get(state)), "")

    def number(self, definition_id: str, day: date) -> str:
        """How many are in the state that matters most, if that is known and more than one."""
        worst = self.worst(definition_id, day)
        count = self.of(definition_id, day).get(worst, 0)
        if count < 2 or (worst == "skipped" and (definition_id, day) in self.uncounted):
            return ""
        return str(count) if count < 100 else "99+"

    def said(self, definition_id: str, day: date) -> str:
        """How many are in each state: `2 failed, 22 succeeded`."""
        counts = self.of(definition_id, day)
        numbers = {state: f"{counts[state]:,}" for state in STATES if counts.get(state)}
        if "skipped" in numbers and (definition_id, day) in self.uncounted:
            numbers["skipped"] = "some"
        return ", ".join(f"{number} {STATES[state]}" for state, number in numbers.items())


def grid(connection: Connection, org_id: OrgId, now: datetime) -> Grid:
    """The last DAYS days of an org, by the UTC day that a run was scheduled for."""
    days = [(now - timedelta(days=back)).date() for back in reversed(range(DAYS))]
    start = now - timedelta(days=DAYS)
    newest = (
        select(_runs.c.id, _runs.c.definition_id, _runs.c.scheduled_for, _runs.c.state, _runs.c.created_at)
        .where(_runs.c.org_id == org_id, _runs.c.id >= lowest_id(start), _runs.c.origin != "child")
        .order_by(_runs.c.id.desc())
        .limit(MAX_RUNS)
        .subquery("newest")
    )
    retry = _runs.alias("retry")
    # By the index on `retry_of` alone: as conditions, the state or the org would tempt SQLite to another.
    last_retry = (
        select(retry.c.state)
        .where(retry.c.retry_of == newest.c.id)
        .order_by(retry.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    state = case(
        (newest.c.state.is_(None), "waiting"),
        (newest.c.state.in_(("failed", "refused")) & (last_retry == "succeeded"), "retried"),
        else_=newest.c.state,
    )
    day = _day_of(connection, newest.c.scheduled_for)
    query = (
        select(
            newest.c.definition_id,
            day.label("day"),
            state.label("state"),
            func.count().label("runs"),
            func.min(newest.c.created_at).label("first_at"),
        )
        .group_by(newest.c.definition_id, day, state)
        .limit(MAX_RUNS)
    )
    cells: dict[tuple[str, date], dict[str, int]] = {}
    total, first_at = 0, now
    for row in all_rows(connection, query):
        counts = cells.setdefault((row["definition_id"], date.fromisoformat(row["day"])), {})
        counts[row["state"]] = row["runs"]
        total += row["runs"]
        first_at = min(first_at, row["first_at"])
    uncounted = _add_skips(connection, org_id, start, days, cells)
    return Grid(days, cells, first_at if total == MAX_RUNS else None, uncounted)


def open_waits(connection: Connection, org_id: OrgId, *, limit: int) -> list[Run]:
    """Runs of an org that wait, in the order in which they start, up to `limit`; then parked ones."""
    # As the condition of the index has it: a parameter would hide it from SQLite's planner.
    waits = select(_live.c.id).where(_live.c.org_id == org_id, _live.c.state == literal_column("'waiting'"))
    order = (_live.c.priority.desc(), _live.c.available_at, _live.c.id)
    ids = list(connection.execute(waits.order_by(*order).limit(limit)).scalars())
    if len(ids) < limit:
        ids += _parked(connection, org_id, limit - len(ids))
    return run_lists.rows_of(connection, org_id, ids) if ids else []


def _parked(connection: Connection, org_id: OrgId, limit: int) -> list[RunId]:
    """Runs of an org that sleep or wait for an answer, by the index of open waits."""
    open_ = select(_open.c.run_id).where(_open.c.org_id == org_id, text(tables.OPEN)).distinct()
    query = select(_live.c.id).where(
        *(_live.c.org_id == org_id, _live.c.state == literal_column("'parked'")),
        _live.c.id.in_(open_),
    )
    return [RunId(id_) for id_ in connection.execute(query.limit(limit)).scalars()]


def _add_skips(
    connection: Connection,
    org_id: OrgId,
    start: datetime,
    days: Sequence[date],
    cells: dict[tuple[str, date], dict[str, int]],
) -> set[tuple[str, date]]:
    """Count a skip on each day of its range; its scheduled times are not stored one by one.

    Returns the definitions and days of ranges of several days.
    """
    uncounted = set[tuple[str, date]]()
    query = (
        select(_skips.c.definition_id, _skips.c.skipped_from, _skips.c.skipped_until, _skips.c.count)
        .where(_skips.c.org_id == org_id)
        .order_by(_skips.c.id.desc())
        .limit(MAX_SKIPS)
    )
    for row in all_rows(connection, query):
        if row["skipped_until"] < start:
            continue
        for day in days:
            if row["skipped_from"].date() <= day <= row["skipped_until"].date():
                counts = cells.setdefault((row["definition_id"], day), {})
                counts["skipped"] = counts.get("skipped", 0) + row["count"]
                if row["skipped_from"].date() != row["skipped_until"].date():
                    uncounted.add((row["definition_id"], day))
    return uncounted


def _day_of(connection: Connection, at: ColumnElement[Any]) -> ColumnElement[Any]:
    """The UTC day of a time as text."""
    if is_postgresql(connection):
        return func.to_char(func.timezone("UTC", at), "YYYY-MM-DD")
    return func.substr(sql_cast(at, Text), 1, 10)


class Revision(TypedDict):
    """A change of a definition: its spec from then on."""

    revision: Shown[int]
    spec: Spec
    at: Shown[datetime]
    by: Annotated[str, redaction.actor]


class Length(TypedDict):
    """An ended run, and its last attempt."""

    id: RunId
    scheduled_for: datetime
    state: str
    started_at: datetime
    finished_at: datetime


def revisions(
    connection: Connection,
    org_id: OrgId,
    definition_id: DefinitionId,
    *,
    before: int | None = None,
    limit: int,
) -> list[Revision]:
    """The newest revisions, or the newest ones before a number."""
    query = (
        select(_revisions.c.revision, _revisions.c.spec, _revisions.c.at, _revisions.c.by)
        .join(_definitions, _definitions.c.id == _revisions.c.definition_id)
        .where(_revisions.c.definition_id == definition_id, _definitions.c.org_id == org_id)
    )
    query = query.where(*below(_revisions.c.revision, before))
    query = query.order_by(_revisions.c.revision.desc()).limit(limit)
    return rows_as(Revision, connection, query)


def lengths(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, limit: int
) -> list[Length]:
    """Those of the newest runs that have started and ended, newest first."""
    newest = (
        select(_runs.c.id, _runs.c.scheduled_for, _runs.c.state, _runs.c.started_at, _runs.c.finished_at)
        .where(_runs.c.org_id == org_id, _runs.c.definition_id == definition_id)
        .where(_runs.c.origin != "child")
        .order_by(_runs.c.id.desc())
        .limit(limit)
    )
    rows = all_rows(connection, newest)
    return cast(list[Length], [row for row in rows if row["started_at"] and row["finished_at"]])


class Broken(TypedDict):
    """A definition whose newest run failed or was refused, or else a credential that is dead.

    `id` is the definition's or the org's, `since` when the run ended or the credential was last used.
    """

    id: Shown[str]
    org: Shown[str]
    definition: Shown[str | None]
    run: Shown[str | None]
    state: Shown[str]
    reason: Shown[str | None]
    detail: Annotated[str | None, redaction.detail]
    since: Shown[datetime | None]


def broken(connection: Connection, scope: OrgScope, page: Page = FIRST_PAGE) -> list[Broken]:
    """What is broken, the newest definitions and orgs first, in pages by `id`.

    `state` of a row is `failed` or `refused`, or `credential_dead`.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id, limit = orgs.scope_of(connection, scope), page.limit or DEFAULT_LIMIT
    found = _definitions_of(connection, org_id, page, limit) + _credentials_of(
        connection, org_id, page, limit
    )
    return sorted(found, key=lambda row: row["id"], reverse=True)[:limit]


def _definitions_of(connection: Connection, scope: Scope, page: Page, limit: int) -> list[Broken]:
    newest = literal_column(f"({failing.NEWEST})", Id)
    statement = (
        select(
            _failing.c.definition_id.label("id"),
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _runs.c.id.label("run"),
            _runs.c.state,
            _runs.c.reason,
            _runs.c.detail,
            _runs.c.finished_at.label("since"),
        )
        .join(_orgs, _orgs.c.id == _failing.c.org_id)
        .join(_definitions, _definitions.c.id == _failing.c.definition_id)
        .join(_runs, _runs.c.id == newest)
        .where(_orgs.c.state != "removed", failing.is_broken())
    )
    statement = statement.where(
        *in_scope(_failing.c.org_id, scope), *below(_failing.c.definition_id, page.after)
    )
    statement = statement.order_by(_failing.c.definition_id.desc()).limit(limit)
    return rows_as(Broken, connection, statement)


def _credentials_of(connection: Connection, scope: Scope, page: Page, limit: int) -> list[Broken]:
    """Each org once, with the newest of its credentials that were rejected."""
    others = _credentials.alias("others")
    newest = (
        select(others.c.id)
        .where(others.c.org_id == _orgs.c.id, others.c.state == "active")
        .order_by(others.c.generation.desc())
        .limit(1)
        .scalar_subquery()
    )
    statement = (
        select(
            _orgs.c.id,
            _orgs.c.code.label("org"),
            null().label("definition"),
            null().label("run"),
            literal_column("'credential_dead'").label("state"),
            null().label("reason"),
            _credentials.c.last_error.label("detail"),
            _credentials.c.last_used_at.label("since"),
        )
        .join(_credentials, _credentials.c.org_id == _orgs.c.id)
        .where(
            text(failing.REJECTED), _credentials.c.id == newest, _orgs.c.state != "removed", failing.is_dead()
        )
    )
    statement = statement.where(*in_scope(_orgs.c.id, scope), *below(_orgs.c.id, page.after))
    statement = statement.order_by(_orgs.c.id.desc()).limit(limit)
    return rows_as(Broken, connection, statement)
