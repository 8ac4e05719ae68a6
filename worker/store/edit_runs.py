"""Runs as people change them: made, cancelled, retried; one by id, or many by a filter in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    and_,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    union_all,
    update,
)

from worker.ids import DefinitionId, OrgId, RunId, Scope
from worker.model.runs.run import NewRun
from worker.model.search import Query, states_of
from worker.store import sweeps, tables
from worker.store.bulk import rows_among
from worker.store.dialect import Row, all_rows, database_now, first_row, hint, in_scope
from worker.store.lists.matching import conditions, few_orgs, orgs_that_match, shown_state

_live = tables.live_runs
_runs = tables.runs
_ends = tables.run_ends
_orgs = tables.orgs
_definitions = tables.definitions
_attempts = tables.attempts

# Fields of a new run that are columns of `runs` and `live_runs`, and of `live_runs` alone.
_OF_BOTH = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "backfill_id"),
    *("idempotency_key", "pool"),
)
_OF_LIVE = ("isolation", "max_concurrent", "priority", "serial", "available_at", "start_by")
# Runs that one statement examines for those that match, first and at most.
FIRST = 500
WINDOW = 20_000


def unfinished(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> list[Row]:
    """The unfinished serial runs of a definition, oldest first, locked; at most one is `held`."""
    query = (
        select(_live)
        .where(_live.c.org_id == org_id, _live.c.definition_id == definition_id)
        .where(_live.c.serial)
        .order_by(_live.c.id)
        .with_for_update()
    )
    return all_rows(connection, query)


def find(connection: Connection, scope: Scope, run_id: RunId) -> Row | None:
    """The row of `runs` of one run, of this org or of any."""
    query = select(_runs).where(_runs.c.id == run_id, *in_scope(_runs.c.org_id, scope))
    return first_row(connection, query)


def find_by_request_key(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, request_key: str
) -> RunId | None:
    """The run that this request key has already made."""
    query = select(_runs.c.id).where(
        _runs.c.org_id == org_id, _runs.c.definition_id == definition_id, _runs.c.request_key == request_key
    )
    return connection.execute(query).scalar_one_or_none()


def is_fired(connection: Connection, org_id: OrgId, run: NewRun) -> bool:
    """Whether the schedule has made a run of this definition and time already."""
    query = select(_runs.c.id).where(
        _runs.c.org_id == org_id,
        _runs.c.definition_id == run.definition_id,
        _runs.c.scheduled_for == run.scheduled_for,
        text("runs.origin = 'schedule'"),
    )
    return connection.execute(query.limit(1)).first() is not None


def insert_run(connection: Connection, run: NewRun, *, at: datetime, held: bool = False) -> None:
    """Insert a run, waiting, or held behind the running one."""
    both = {name: getattr(run, name) for name in _OF_BOTH}
    both["params"] = None if run.params is None else dict(run.params)
    made = {name: getattr(run, name) for name in ("created_by", "request_key", "retry_of")}
    connection.execute(insert(_runs).values(**both, **made, created_at=run.created_at or at))
    waits = {name: getattr(run, name) for name in _OF_LIVE}
    waits |= {"variant_handlers": list(run.variant_handlers) or None}
    waits |= {"state": "held" if held else "waiting", "reason": "held" if held else "due"}
    connection.execute(insert(_live).values(**both, **waits))
    hint(connection)


def copy_checkpoint(connection: Connection, org_id: OrgId, of: RunId, to: RunId, *, at: datetime) -> bool:
    """Start a new run from an older one's checkpoint; False if that has none."""
    saved = tables.checkpoints
    data = connection.execute(
        select(saved.c.data, saved.c.handler).where(saved.c.run_id == of, saved.c.org_id == org_id)
    ).first()
    if data is None:
        return False
    ids = {"run_id": to, "org_id": org_id, "attempt": 0, "fencing_token": 0}
    connection.execute(insert(saved).values(**ids, saved_at=at, data=data.data, handler=data.handler))
    return True


def end_waiting(
    connection: Connection,
    org_id: OrgId,
    *which: ColumnElement[bool],
    reason: str,
    counts: sweeps.EndCounts | None = None,
) -> list[RunId]:
    """Cancel these runs of one org that no process runs, held and parked ones too; returns them.

    With `counts`, the caller writes the sums.
    """
    unstarted = (_live.c.org_id == org_id, _live.c.state.in_(tables.UNSTARTED))
    ids = connection.execute(select(_live.c.id).where(*unstarted, *which)).scalars().all()
    ended = sweeps.end_waiting(connection, org_id, ids, state="cancelled", reason=reason, counts=counts)
    return [run.run_id for run in ended]


def end_waiting_of(
    connection: Connection,
    scope: Scope,
    definition_ids: Sequence[DefinitionId],
    *,
    reason: str,
    counts: sweeps.EndCounts,
) -> None:
    """As `end_waiting`, for all runs of these definitions at once."""
    query = select(_live.c.id)
    query = query.where(_live.c.state.in_(tables.UNSTARTED), *in_scope(_live.c.org_id, scope))
    ids = [id_ for (id_,) in rows_among(connection, query, _live.c.definition_id, definition_ids)]
    sweeps.end_waiting(connection, scope, ids, state="cancelled", reason=reason, counts=counts)


def ask_to_stop(
    connection: Connection, org_id: OrgId, *which: ColumnElement[bool], reason: str, at: datetime
) -> int:
    """Request cancellation of running runs of one org; their workers see it at the next renewal."""
    running = (_live.c.org_id == org_id, _live.c.state == "running", _live.c.cancel_requested_at.is_(None))
    requested = update(_live).where(in_order(*running, *which))
    return connection.execute(requested.values(cancel_requested_at=at, cancel_reason=reason)).rowcount


def lock(connection: Connection, org_id: OrgId) -> None:
    """Lock the unfinished runs of one org, in the order of ids: no other is admitted or ends meanwhile."""
    query = select(_live.c.id).where(_live.c.org_id == org_id).order_by(_live.c.id)
    connection.execute(query.with_for_update()).all()


def in_order(*which: ColumnElement[bool]) -> ColumnElement[bool]:
    """A condition that locks these unfinished runs in the order of ids, as all batches do."""
    return _live.c.id.in_(select(_live.c.id).where(*which).order_by(_live.c.id).with_for_update())


def is_run(run_id: RunId) -> ColumnElement[bool]:
    """A condition for `end_waiting` and `ask_to_stop`: one run."""
    return _live.c.id == run_id


def is_of(definition_id: DefinitionId) -> ColumnElement[bool]:
    """A condition: the runs of one definition."""
    return _live.c.definition_id == definition_id


def is_serial() -> ColumnElement[bool]:
    """A condition: no backfills and no runs that may overlap."""
    return _live.c.serial


@dataclass(frozen=True, slots=True)
class _Filter:
    """What narrows a change of many runs: each part if it is given."""

    state: str | None = None
    definition: str | None = None
    since: datetime | None = None
    reason: str | None = None
    query: Query | None = None

    def _check(self, known: Sequence[str], what: str) -> None:
        """Raise UsageError if such a run cannot have a state that the filter names."""
        named = (self.state, ",".join(sorted(self.query.states)) if self.query else None)
        for states in filter(None, named):
            states_of(states, known, what=what)


@dataclass(frozen=True, slots=True)
class Cancellable(_Filter):
    """A filter for unfinished runs without a cancellation request; `since` is their earliest creation.

    `state` is one or more, separated by commas; `query` is a search that they match, too.

    Raises:
        UsageError: an unfinished run cannot have this state.
    """

    def __post_init__(self) -> None:
        self._check(tuple(tables.UNFINISHED), "a run that can be cancelled")

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(tables.UNFINISHED) if self.state is None else states_of(self.state)


@dataclass(frozen=True, slots=True)
class Retryable(_Filter):
    """A filter for ended runs without a retry; `since` is their earliest end, `cause` the last `error_cause`.

    `state` is one or more, separated by commas: failed ones if neither it nor `query`, a search that
    they match, too, says so.

    Raises:
        UsageError: an ended run cannot have this state.
    """

    cause: str | None = None

    def __post_init__(self) -> None:
        self._check(tables.FINAL_STATES, "a run that has ended")

    @property
    def states(self) -> tuple[str, ...]:
        if self.state is not None:
            return states_of(self.state)
        return tuple(self.query.states) if self.query is not None and self.query.states else ("failed",)


def last_match(connection: Connection, scope: Scope, which: Cancellable | Retryable) -> Any:
    """`until` of the pages of a command given now: it does not affect runs made or ended later.

    For unfinished runs the newest one, None without any; for ended runs the time.
    """
    if isinstance(which, Retryable):
        return database_now(connection)
    newest = select(_live.c.id).where(*in_scope(_live.c.org_id, scope)).order_by(_live.c.id.desc()).limit(1)
    return connection.execute(newest).scalars().first()


def page(
    connection: Connection,
    scope: Scope,
    which: Cancellable | Retryable,
    *,
    until: Any,
    after: Row | None,
    limit: int,
) -> list[Row]:
    """The first `limit` runs of one org or of all that match and follow the row `after`.

    Oldest first, by id or by end, up to `until` from `last_match`. Each statement examines a bounded number
    of runs in the order of an index; there are as many as it takes.
    """
    rows, order = (_ends, ("finished_at", "id")) if isinstance(which, Retryable) else (_live, ("id",))
    few = [*in_scope(rows.c.org_id, scope)]
    of_code = None if which.query is None else replace(which.query, words=())
    if of_code is not None and (ids := few_orgs(connection, scope, of_code)) is not None:
        few.append(rows.c.org_id.in_(ids))
    found: list[Row] = []
    size = FIRST
    while True:
        if isinstance(which, Retryable):
            sources = _ended(which, until, after)
        else:
            sources = [_unfinished(which, until, after)]
        parts = [source.where(*few).order_by(*order).limit(size).subquery() for source in sources]
        window = union_all(*map(select, parts)).order_by(*order).limit(size).subquery("examined")
        matching = _matching(window, scope, which).order_by(*(window.c[name] for name in order))
        if of_code is not None and not few:
            matching = matching.where(*orgs_that_match(connection, scope, of_code, window.c.org_id))
        found += all_rows(connection, matching.limit(limit - len(found)))
        if len(found) == limit:
            return found
        last = select(*(window.c[name] for name in order), func.count().over().label("size"))
        row = first_row(connection, last.order_by(*(window.c[name].desc() for name in order)).limit(1))
        if row is None or row.pop("size") < size:
            return found
        after, size = row, min(4 * size, WINDOW)


def _unfinished(which: Cancellable, until: RunId, after: Row | None) -> Select[Any]:
    """The unfinished runs in the order of their ids."""
    state = shown_state(_live.c.state).label("state")
    where = [_live.c.id <= until, _live.c.cancel_requested_at.is_(None)]
    if after is not None:
        where.append(_live.c.id > after["id"])
    if which.state is not None:
        where.append(_live.c.state.in_([kept for each in which.states for kept in tables.UNFINISHED[each]]))
    if which.reason is not None:
        where.append(_live.c.reason == which.reason)
    names = ("id", "org_id", "definition_id", "reason", "detail", "started_at")
    return select(*(_live.c[name] for name in names), state).where(*where)


def _ended(which: Retryable, until: datetime, after: Row | None) -> list[Select[Any]]:
    """The ended runs in the order of their ends: one selection a state, as their index has them."""
    ended_at, id_ = _ends.c.finished_at, _ends.c.run_id
    where = [ended_at <= until]
    if after is not None:
        at, run_id = after["finished_at"], after["id"]
        where += [ended_at >= at, or_(ended_at > at, and_(ended_at == at, id_ > run_id))]
    # A run ends after it was made.
    where += [ended_at >= since for since in (which.since, which.query and which.query.since) if since]
    columns = (id_.label("id"), _ends.c.org_id, _ends.c.definition_id, _ends.c.state, ended_at)
    return [select(*columns).where(_ends.c.state == state, *where) for state in which.states]


def _matching(window: FromClause, scope: Scope, which: Cancellable | Retryable) -> Select[Any]:
    """The rows of a window that match what its own columns do not say."""
    row = window.c
    # Looked up row by row: as joins, PostgreSQL would rather read all orgs.
    org = select(_orgs.c.code).where(_orgs.c.id == row.org_id).scalar_subquery()
    definition = select(_definitions.c.name).where(_definitions.c.id == row.definition_id).scalar_subquery()
    where = [] if which.query is None else conditions(scope, which.query, _runs.c)
    if which.definition is not None:
        where.append(definition == which.definition)
    if isinstance(which, Retryable):
        columns = [_runs.c.reason, _runs.c.detail, row.finished_at]
        newer = _runs.alias("newer")
        where.append(~exists().where(newer.c.retry_of == row.id))
        if which.reason is not None:
            where.append(_runs.c.reason == which.reason)
        if which.cause is not None:
            last = select(_attempts.c.error_cause).where(_attempts.c.run_id == row.id)
            last = last.order_by(_attempts.c.attempt.desc()).limit(1)
            where.append(last.scalar_subquery() == which.cause)
    else:
        columns = [row.reason, row.detail, row.started_at]
        if which.since is not None:
            where.append(_runs.c.created_at >= which.since)
    return (
        select(row.id, org.label("org"), definition.label("definition"), _runs.c.scheduled_for, row.state)
        .add_columns(*columns)
        .join(_runs, _runs.c.id == row.id)
        .where(*where)
    )


def retry_of(connection: Connection, org_id: OrgId, run_id: RunId) -> RunId | None:
    """The newest run that retries this one, if there is one."""
    retries = select(_runs.c.id).where(_runs.c.org_id == org_id, _runs.c.retry_of == run_id)
    # By id, SQLite would look through all runs of the org.
    return connection.execute(retries.order_by(_runs.c.created_at.desc()).limit(1)).scalar_one_or_none()
