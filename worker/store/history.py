"""History: what was in force at a scheduled time, what became of it, and how attempts went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Select, func, select

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions import MISFIRE_GRACE
from worker.store import tables
from worker.store.dialect import Row, all_rows, chunks, first_row

# Rows that are read before the answer is "at least": a broken release fails a hundred times a second.
MAX_ROWS = 10_000

# Runs before and after one that are read.
NEIGHBOURS = 1_000

# Outcomes of attempts that nothing outside cut short.
OWN_ENDS = ("succeeded", "failed", "retry", "timed_out", "snoozed")

_attempts = tables.attempts
_live = tables.live_runs
_runs = tables.runs
_skips = tables.skips
_revisions = tables.definition_revisions
_audit = tables.audit
_NO_TOKEN = (_live.c.state == "waiting", _live.c.reason == "no_token")


@dataclass(frozen=True, slots=True)
class Others:
    """The number of other orgs; `more`: at least this many."""

    orgs: int
    more: bool = False


def others_that_failed(
    connection: Connection, org_id: OrgId, cause: str, start: datetime, end: datetime
) -> Others:
    """Other orgs with an attempt that ended with this `error_cause` in [start, end)."""
    return _others(
        connection,
        select(_attempts.c.org_id).where(
            _attempts.c.error_cause == cause,
            _attempts.c.ended_at >= start,
            _attempts.c.ended_at < end,
            _attempts.c.org_id != org_id,
        ),
    )


def others_without_token(connection: Connection, org_id: OrgId) -> Others:
    """Other orgs with a run that waits for a token now."""
    return _others(connection, select(_live.c.org_id).where(*_NO_TOKEN, _live.c.org_id != org_id))


@dataclass(frozen=True, slots=True)
class Around:
    """Ended runs of a definition: one and those before it, newest first, and those after it, oldest first.

    Each has state, reason, error and finished_at. `more`: there are others after them.
    """

    before: Sequence[Row]
    after: Sequence[Row]
    more: bool = False


def around(connection: Connection, org_id: OrgId, run_id: RunId) -> Around:
    """The runs of the run's definition around it, up to `NEIGHBOURS` on each side."""
    mine = select(_runs.c.definition_id).where(_runs.c.id == run_id, _runs.c.org_id == org_id)
    query = select(_runs.c.state, _runs.c.reason, _runs.c.error, _runs.c.finished_at).where(
        _runs.c.definition_id == mine.scalar_subquery(), _runs.c.org_id == org_id
    )
    # Beside a child are those of its definition that nothing started.
    query = query.where((_runs.c.origin != "child") | (_runs.c.id == run_id))
    sides = (
        query.where(_runs.c.id <= run_id).order_by(_runs.c.id.desc()),
        query.where(_runs.c.id > run_id).order_by(_runs.c.id),
    )
    # With those that have not ended yet, which are left out.
    read = [all_rows(connection, side.limit(NEIGHBOURS)) for side in sides]
    before, after = ([row for row in rows if row["state"] is not None] for rows in read)
    return Around(before, after, len(read[1]) == NEIGHBOURS)


def without_token_since(connection: Connection, org_id: OrgId) -> datetime | None:
    """When the first of the org's runs that wait for a token ended its first attempt without one."""
    waiting = select(_live.c.id).where(*_NO_TOKEN, _live.c.org_id == org_id)
    query = select(func.min(_attempts.c.ended_at)).where(
        _attempts.c.run_id.in_(waiting.limit(NEIGHBOURS).subquery().select()),
        _attempts.c.outcome == "no_token",
    )
    found: datetime | None = connection.execute(query).scalar_one_or_none()
    return found


def is_rejected(connection: Connection, org_id: OrgId) -> bool:
    """Whether the org has no active credential but rejected ones."""
    table = tables.credentials
    works = select(table.c.id).where(
        table.c.org_id == org_id, table.c.state == "active", table.c.last_error.is_(None)
    )
    return connection.execute(works.limit(1)).first() is None


def _others(connection: Connection, query: Select[tuple[str]]) -> Others:
    found = query.limit(MAX_ROWS).subquery()
    orgs, rows = connection.execute(
        select(func.count(found.c.org_id.distinct()), func.count(found.c.org_id))
    ).one()
    return Others(orgs, rows == MAX_ROWS)


# Runs that `run_in_the_way` reads: those made within the grace of a scheduled time.
_NEAR = 100


def revision_at(connection: Connection, definition_id: DefinitionId, at: datetime) -> Row | None:
    """The revision in force at a time: the last one made by then, else the first."""
    made = select(_revisions).where(_revisions.c.definition_id == definition_id)
    last = made.where(_revisions.c.at <= at).order_by(_revisions.c.revision.desc())
    return first_row(connection, last) or first_row(connection, made.order_by(_revisions.c.revision))


def run_of(connection: Connection, org_id: OrgId, definition_id: DefinitionId, at: datetime) -> RunId | None:
    """The run of this scheduled time: the schedule's, else the newest one."""
    mine = select(_runs.c.id).where(
        _runs.c.org_id == org_id, _runs.c.definition_id == definition_id, _runs.c.scheduled_for == at
    )
    scheduled = mine.where(_runs.c.origin == "schedule")
    found = connection.execute(scheduled).scalar_one_or_none()
    # Its children have the same scheduled time.
    others = mine.where(_runs.c.origin != "child").order_by(_runs.c.id.desc()).limit(1)
    return found or connection.execute(others).scalar_one_or_none()


def skip_of(connection: Connection, org_id: OrgId, definition_id: DefinitionId, at: datetime) -> Row | None:
    """The row of `skips` that counts this scheduled time."""
    query = select(_skips).where(
        _skips.c.org_id == org_id,
        _skips.c.definition_id == definition_id,
        _skips.c.skipped_from <= at,
        _skips.c.skipped_until >= at,
    )
    return first_row(connection, query.order_by(_skips.c.skipped_from.desc()).limit(1))


def run_in_the_way(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, at: datetime
) -> RunId | None:
    """The run that a scheduled one overlapped at that time: the oldest unfinished one."""
    query = (
        select(_runs.c.id)
        .where(
            _runs.c.org_id == org_id,
            _runs.c.definition_id == definition_id,
            _runs.c.origin.not_in(("backfill", "child")),
            _runs.c.created_at <= at + MISFIRE_GRACE,
            _runs.c.finished_at.is_(None) | (_runs.c.finished_at >= at),
        )
        .order_by(_runs.c.id.desc())
        .limit(_NEAR)
    )
    return min(connection.execute(query).scalars(), default=None)


def last_change(
    connection: Connection, org_id: OrgId, subject: str, actions: Sequence[str], at: datetime
) -> Row | None:
    """The last of these actions on a subject by that time: who, when and which."""
    query = (
        select(_audit.c.at, _audit.c.actor, _audit.c.action, _audit.c.detail)
        .where(
            _audit.c.org_id == org_id,
            _audit.c.subject == subject,
            _audit.c.action.in_(actions),
            _audit.c.at <= at,
        )
        .order_by(_audit.c.id.desc())
        .limit(1)
    )
    return first_row(connection, query)


def last_attempts(
    connection: Connection, definition_id: DefinitionId, handler: str, *, limit: int
) -> list[Row]:
    """The newest attempts of a definition with this handler that ended by themselves: seconds, peak_memory.

    An attempt that a flag gave to a variant counts for the definition's handler.
    """
    newest = (
        select(_runs.c.id)
        .where(_runs.c.definition_id == definition_id, _runs.c.handler == handler)
        .order_by(_runs.c.id.desc())
        .limit(limit)
    )
    return _lengths(connection, dict.fromkeys(connection.execute(newest).scalars(), definition_id))


def newest_attempts(connection: Connection, handler: str, definitions: Sequence[DefinitionId]) -> list[Row]:
    """As `last_attempts`, of the newest ended run of each of these definitions of any orgs."""
    newest = (
        select(_runs.c.id)
        .where(
            _runs.c.definition_id == tables.definitions.c.id,
            _runs.c.state.is_not(None),
            _runs.c.handler == handler,
        )
        .order_by(_runs.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    found: list[Row] = []
    for part in chunks(definitions):
        query = select(newest, tables.definitions.c.id).where(tables.definitions.c.id.in_(part))
        runs = {run_id: id_ for run_id, id_ in connection.execute(query) if run_id is not None}
        # A step of its own: with both in one, PostgreSQL may read the table of attempts instead of its index.
        found += _lengths(connection, runs)
    return found


def _lengths(connection: Connection, runs: Mapping[RunId, DefinitionId]) -> list[Row]:
    query = select(
        _attempts.c.run_id, _attempts.c.started_at, _attempts.c.ended_at, _attempts.c.peak_memory
    ).where(_attempts.c.run_id.in_(list(runs)), _attempts.c.outcome.in_(OWN_ENDS))
    return [
        {
            "definition_id": runs[row["run_id"]],
            "seconds": (row["ended_at"] - row["started_at"]).total_seconds(),
            "peak_memory": row["peak_memory"],
        }
        for row in connection.execute(query).mappings()
    ]


def last_claims(connection: Connection, org_id: OrgId) -> Row | None:
    """The redacted claims of the org's last run that got a token, or None."""
    last = last_token(connection, org_id)
    return None if last is None else dict(last["claims"])


def last_token(connection: Connection, org_id: OrgId) -> Row | None:
    """`run`, `definition` (its name), `at` and `claims` of the org's last run that got a token, or None."""
    newest = select(_runs.c.id).where(_runs.c.org_id == org_id).order_by(_runs.c.id.desc()).limit(20)
    named = tables.definitions
    query = (
        select(
            _attempts.c.run_id.label("run"),
            named.c.name.label("definition"),
            _attempts.c.token_ready_at.label("at"),
            _attempts.c.claims,
        )
        .join(_runs, _runs.c.id == _attempts.c.run_id)
        .join(named, named.c.id == _runs.c.definition_id)
        .where(_attempts.c.run_id.in_(newest.subquery().select()), _attempts.c.claims.is_not(None))
        .order_by(_attempts.c.run_id.desc(), _attempts.c.attempt.desc())
        .limit(1)
    )
    return first_row(connection, query)
