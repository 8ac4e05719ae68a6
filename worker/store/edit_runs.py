"""Runs as people change them: made by hand, cancelled, retried; one by id, or many by a filter in pages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, func, insert, or_, select, update

from worker.errors import UsageError
from worker.ids import DefinitionId, OrgId, RunId
from worker.runs.run import NewRun
from worker.store import sweeps, tables
from worker.store.listener import hint
from worker.store.lists.paging import Row

_live = tables.live_runs
_runs = tables.runs

StoredRow = dict[str, Any]


def unfinished(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> list[StoredRow]:
    """The definition's serial runs that have not ended, oldest first, locked; at most one is `held`."""
    query = (
        select(_live)
        .where(_live.c.org_id == org_id, _live.c.definition_id == definition_id)
        .where(_live.c.serial)
        .order_by(_live.c.id)
        .with_for_update()
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def find(connection: Connection, org_id: OrgId, run_id: RunId) -> StoredRow | None:
    """The row of `runs` of one run of this org."""
    query = select(_runs).where(_runs.c.id == run_id, _runs.c.org_id == org_id)
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def find_for_all_orgs(connection: Connection, run_id: RunId) -> StoredRow | None:
    """As `find`, of whichever org."""
    row = connection.execute(select(_runs).where(_runs.c.id == run_id)).mappings().first()
    return None if row is None else dict(row)


def lock(connection: Connection, org_id: OrgId, run_id: RunId) -> bool:
    """Lock a run that has not ended, so that its state stays; false where it has ended."""
    query = select(_live.c.id).where(_live.c.id == run_id, _live.c.org_id == org_id).with_for_update()
    return connection.execute(query).first() is not None


def find_by_request_key(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, request_key: str
) -> RunId | None:
    """The run that this request key made already."""
    query = select(_runs.c.id).where(
        _runs.c.org_id == org_id,
        _runs.c.definition_id == definition_id,
        _runs.c.request_key == request_key,
    )
    return connection.execute(query).scalar_one_or_none()


def insert_run(connection: Connection, run: NewRun, *, at: datetime, held: bool = False) -> None:
    """Insert a run made by hand, waiting or held back behind the one that is on."""
    connection.execute(
        insert(_runs).values(
            id=run.id,
            org_id=run.org_id,
            definition_id=run.definition_id,
            revision=run.revision,
            handler=run.handler,
            origin=run.origin,
            scheduled_for=run.scheduled_for,
            created_at=at,
            created_by=run.created_by,
            request_key=run.request_key,
            backfill_id=run.backfill_id,
            retry_of=run.retry_of,
            idempotency_key=run.idempotency_key,
            params=None if run.params is None else dict(run.params),
        )
    )
    connection.execute(
        insert(_live).values(
            id=run.id,
            org_id=run.org_id,
            definition_id=run.definition_id,
            revision=run.revision,
            handler=run.handler,
            variant_handlers=list(run.variant_handlers) or None,
            isolation=run.isolation,
            origin=run.origin,
            scheduled_for=run.scheduled_for,
            idempotency_key=run.idempotency_key,
            params=None if run.params is None else dict(run.params),
            backfill_id=run.backfill_id,
            max_concurrent=run.max_concurrent,
            priority=run.priority,
            serial=run.serial,
            state="held" if held else "waiting",
            reason="held" if held else "due",
            available_at=run.available_at,
            start_by=run.start_by,
        )
    )
    hint(connection)


def copy_checkpoint(connection: Connection, org_id: OrgId, of: RunId, to: RunId, *, at: datetime) -> bool:
    """Let a new run begin from an older one's checkpoint; false where that has none."""
    saved = tables.checkpoints
    data = connection.execute(
        select(saved.c.data).where(saved.c.run_id == of, saved.c.org_id == org_id)
    ).first()
    if data is None:
        return False
    connection.execute(
        insert(saved).values(run_id=to, org_id=org_id, attempt=0, fencing_token=0, saved_at=at, data=data[0])
    )
    return True


def end_waiting(
    connection: Connection, org_id: OrgId, *which: ColumnElement[bool], reason: str
) -> list[RunId]:
    """Cancel those runs of one org that have not started, held ones too; which they were."""
    unstarted = (_live.c.org_id == org_id, _live.c.state.in_(("waiting", "held")))
    ids = connection.execute(select(_live.c.id).where(*unstarted, *which)).scalars().all()
    ended = sweeps.end_waiting(connection, org_id, ids, state="cancelled", reason=reason)
    return [run.run_id for run in ended]


def ask_to_stop(
    connection: Connection, org_id: OrgId, *which: ColumnElement[bool], reason: str, at: datetime
) -> int:
    """Ask running runs of one org to stop; their workers see it with the next renewal. How many."""
    asked = connection.execute(
        update(_live)
        .where(
            _live.c.org_id == org_id,
            _live.c.state == "running",
            _live.c.cancel_requested_at.is_(None),
            *which,
        )
        .values(cancel_requested_at=at, cancel_reason=reason)
    )
    return asked.rowcount


def is_run(run_id: RunId) -> ColumnElement[bool]:
    """The condition that names one run, for `end_waiting` and `ask_to_stop`."""
    return _live.c.id == run_id


def is_of(definition_id: DefinitionId) -> ColumnElement[bool]:
    """The condition that names the runs of one definition."""
    return _live.c.definition_id == definition_id


def is_serial() -> ColumnElement[bool]:
    """The condition that leaves backfills and overlapping runs out."""
    return _live.c.serial


_orgs = tables.orgs
_definitions = tables.definitions

STATES = {"waiting": ("waiting", "held"), "running": ("running",)}


@dataclass(frozen=True, slots=True)
class Cancellable:
    """Runs that wait or run; `since` bounds their making, `reason` is what those that wait do so for.

    Raises:
        UsageError: a state that is not one of an unfinished run.
    """

    state: str | None = None
    definition: str | None = None
    since: datetime | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.state is not None and self.state not in STATES:
            raise UsageError(
                f"{self.state!r} is no state of a run that can be cancelled",
                fix=f"one of {', '.join(STATES)}",
            )


def newest_for_all_orgs(connection: Connection) -> RunId | None:
    """The newest unfinished run; what is made later is not meant by a command given now."""
    return connection.execute(select(_live.c.id).order_by(_live.c.id.desc()).limit(1)).scalars().first()


def cancellable_page(
    connection: Connection,
    org_id: OrgId,
    which: Cancellable,
    *,
    until: RunId,
    after: RunId | None,
    limit: int,
) -> list[Row]:
    """The first `limit` of one org's such runs, up to the run `until`, that follow `after`."""
    return _cancellable_page(connection, [_live.c.org_id == org_id], which, until, after, limit)


def cancellable_page_for_all_orgs(
    connection: Connection, which: Cancellable, *, until: RunId, after: RunId | None, limit: int
) -> list[Row]:
    """As `page`, of every org."""
    return _cancellable_page(connection, [], which, until, after, limit)


def _cancellable_page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    which: Cancellable,
    until: RunId,
    after: RunId | None,
    limit: int,
) -> list[Row]:
    where += [_live.c.id <= until, _live.c.cancel_requested_at.is_(None)]
    if after is not None:
        where.append(_live.c.id > after)
    if which.state is not None:
        where.append(_live.c.state.in_(STATES[which.state]))
    if which.since is not None:
        where.append(_runs.c.created_at >= which.since)
    if which.definition is not None:
        where.append(_definitions.c.name == which.definition)
    if which.reason is not None:
        where.append(_live.c.reason == which.reason)
    query = (
        select(
            _live.c.id,
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _live.c.scheduled_for,
            func.replace(_live.c.state, "held", "waiting").label("state"),
            _live.c.reason,
            _live.c.detail,
            _live.c.started_at,
        )
        .join(_runs, _runs.c.id == _live.c.id)
        .join(_orgs, _orgs.c.id == _live.c.org_id)
        .join(_definitions, _definitions.c.id == _live.c.definition_id)
        .where(*where)
        .order_by(_live.c.id)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


_ends = tables.run_ends
_attempts = tables.attempts

# Instant of the end and id of a run: what follows it is the next page.
Key = tuple[datetime, str]


@dataclass(frozen=True, slots=True)
class Retryable:
    """Runs that ended as `state`; `since` bounds their end, `cause` is the last attempt's `error_cause`.

    Raises:
        UsageError: a state that is not one of an ended run.
    """

    state: str = "failed"
    definition: str | None = None
    since: datetime | None = None
    reason: str | None = None
    cause: str | None = None

    def __post_init__(self) -> None:
        if self.state not in tables.FINAL_STATES:
            raise UsageError(
                f"{self.state!r} is no state of a run that has ended",
                fix=f"one of {', '.join(tables.FINAL_STATES)}",
            )


def retryable_page(
    connection: Connection, org_id: OrgId, which: Retryable, *, until: datetime, after: Key | None, limit: int
) -> list[Row]:
    """The first `limit` of one org's such runs that ended at or before `until` and follow `after`."""
    return _retryable_page(connection, [_ends.c.org_id == org_id], which, until, after, limit)


def retryable_page_for_all_orgs(
    connection: Connection, which: Retryable, *, until: datetime, after: Key | None, limit: int
) -> list[Row]:
    """As `page`, of every org."""
    return _retryable_page(connection, [], which, until, after, limit)


def retry_of(connection: Connection, run_id: RunId) -> RunId | None:
    """A run that retries this one, if there is any."""
    return connection.execute(select(_runs.c.id).where(_runs.c.retry_of == run_id)).scalars().first()


def _retryable_page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    which: Retryable,
    until: datetime,
    after: Key | None,
    limit: int,
) -> list[Row]:
    newer = _runs.alias("newer")
    ended_at, id_ = _ends.c.finished_at, _ends.c.run_id
    where += [_ends.c.state == which.state, ended_at <= until, ~exists().where(newer.c.retry_of == id_)]
    if after is not None:
        at, run_id = after
        where += [ended_at >= at, or_(ended_at > at, and_(ended_at == at, id_ > run_id))]
    if which.since is not None:
        where.append(ended_at >= which.since)
    if which.definition is not None:
        where.append(_definitions.c.name == which.definition)
    if which.reason is not None:
        where.append(_runs.c.reason == which.reason)
    if which.cause is not None:
        last = (
            select(_attempts.c.error_cause)
            .where(_attempts.c.run_id == _runs.c.id)
            .order_by(_attempts.c.attempt.desc())
            .limit(1)
        )
        where.append(last.scalar_subquery() == which.cause)
    query = (
        select(
            id_.label("id"),
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _runs.c.scheduled_for,
            _ends.c.state,
            _runs.c.reason,
            _runs.c.detail,
            ended_at,
        )
        .select_from(_ends)
        .join(_runs, _runs.c.id == id_)
        .join(_orgs, _orgs.c.id == _ends.c.org_id)
        .join(_definitions, _definitions.c.id == _ends.c.definition_id)
        .where(*where)
        .order_by(ended_at, id_)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]
