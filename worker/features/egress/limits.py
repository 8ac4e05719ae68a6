"""Limits of calls to other services: what `apply` changes, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection

from worker.model.definitions.limits import COLUMNS, LimitEntry
from worker.operations.changes import LimitChange, differing
from worker.store import audit, limits
from worker.store.database import Database
from worker.store.lists.limits import limit
from worker.store.lists.rows import LimitDetail


def limit_changes(connection: Connection, entries: Sequence[LimitEntry]) -> list[LimitChange]:
    """What a file changes. The stored limits are locked until the transaction ends."""
    stored = limits.every(connection, lock=True)
    changes = []
    for entry in entries:
        before = stored.get((entry.origin, entry.per))
        if before is None or differing({key: before[key] for key in COLUMNS}, entry.values):
            new = {"origin": entry.origin, "per": entry.per, **entry.values}
            changes.append(LimitChange(before, new))
    return changes


def write_limits(connection: Connection, changes: Sequence[LimitChange], *, actor: str, at: datetime) -> None:
    """Write limits that are added, changed or removed; workers follow within seconds."""
    for change in changes:
        if change.new is not None:
            limits.put(connection, change.new, change.before, at=at, actor=actor)
        elif change.before is not None:
            limits.remove(connection, change.before["id"])


def remove_limit(database: Database, origin: str, per: str, *, actor: str) -> LimitDetail:
    """Delete a limit, and return what it was; requests that wait for it go on.

    Raises:
        NotFound: there is no such limit.
    """
    with database.transaction() as connection:
        row = limit(connection, origin, per)
        change = LimitChange(dict(row), None)
        at = database.now(connection)
        write_limits(connection, [change], actor=actor, at=at)
        audit.record(connection, [change.audit_entry()], at=at, actor=actor)
        return row
