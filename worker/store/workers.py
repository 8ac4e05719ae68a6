"""The worker incarnations: one row a process, whose lease is its right to the runs it owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from worker.ids import WorkerId
from worker.store import tables
from worker.store.connection import database_now

_workers = tables.workers
_live = tables.live_runs


def register(
    connection: Connection,
    worker_id: WorkerId,
    *,
    host: str,
    pid: int,
    version: str,
    lease: timedelta,
    handlers: Sequence[str],
    capacity: Mapping[str, Any],
) -> None:
    """Begin an incarnation; its lease counts from the database's now."""
    now = database_now(connection)
    connection.execute(
        insert(_workers).values(
            id=worker_id,
            host=host,
            pid=pid,
            version=version,
            started_at=now,
            renewed_at=now,
            lease_until=now + lease,
            handlers=sorted(handlers),
            capacity=dict(capacity),
        )
    )


def update_handlers(connection: Connection, worker_id: WorkerId, handlers: Sequence[str]) -> None:
    """Say which handlers the worker offers from now on."""
    connection.execute(update(_workers).where(_workers.c.id == worker_id).values(handlers=sorted(handlers)))


def unregister(connection: Connection, worker_id: WorkerId) -> None:
    """End an incarnation; what it still owns is recovered by whoever looks next."""
    connection.execute(
        update(_workers)
        .where(_workers.c.id == worker_id, _workers.c.ended_at.is_(None))
        .values(ended_at=database_now(connection))
    )


def forget_ended(connection: Connection, *, older_than: timedelta) -> int:
    """Delete the rows of workers that ended long ago and own nothing; returns how many."""
    owned = select(_live.c.worker_id).where(_live.c.state == "running")
    result = connection.execute(
        delete(_workers).where(
            _workers.c.ended_at < database_now(connection) - older_than, _workers.c.id.not_in(owned)
        )
    )
    return result.rowcount
