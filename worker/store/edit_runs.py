"""Runs as people change them: made by hand, ended before they start, asked to stop. Core, not hot."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select, update

from worker.ids import DefinitionId, OrgId, RunId
from worker.runs.run import NewRun
from worker.store import sweeps, tables
from worker.store.listener import hint

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
