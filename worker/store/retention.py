"""Retention: rows that ended long ago are deleted, a few at a time. Sums are kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select, text

from worker.store import tables
from worker.store.connection import database_now, is_postgresql

_runs = tables.runs
_ends = tables.run_ends

# What belongs to a run and goes with it.
_OF_A_RUN = (tables.run_logs, tables.checkpoints, tables.attempts)

# By their place in the table: its rows never change, and a key of three columns is slow to name.
_SOME = {
    "postgresql": """
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
          SELECT ctid FROM {table} WHERE run_id IN :ids LIMIT :limit FOR UPDATE SKIP LOCKED))
        """,
    "sqlite": """
        DELETE FROM {table} WHERE rowid IN (
          SELECT rowid FROM {table} WHERE run_id IN :ids LIMIT :limit)
        """,
}
_OLDEST = {
    "postgresql": """
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
          SELECT ctid FROM {table} WHERE {at} < :before ORDER BY {at} LIMIT :limit FOR UPDATE SKIP LOCKED))
        """,
    "sqlite": """
        DELETE FROM {table} WHERE rowid IN (
          SELECT rowid FROM {table} WHERE {at} < :before ORDER BY {at} LIMIT :limit)
        """,
}


def forget_parts(connection: Connection, state: str, age: timedelta, *, runs: int, limit: int) -> int:
    """Delete lines and attempts of the runs that `forget_runs` takes next, at most so many of each.

    Of one run there may be thousands: a log's lines, the attempts of one that snoozed for
    weeks. Gives the greater of the two numbers.
    """
    ids = _old_runs(connection, state, age, runs)
    if not ids:
        return 0
    query = _SOME["postgresql" if is_postgresql(connection) else "sqlite"]
    named = bindparam("ids", ids, type_=tables.runs.c.id.type, expanding=True)
    return max(
        connection.execute(text(query.format(table=table)).bindparams(named), {"limit": limit}).rowcount
        for table in ("run_logs", "attempts")
    )


def forget_runs(connection: Connection, state: str, age: timedelta, *, limit: int) -> int:
    """Delete the oldest runs that ended in this state longer than `age` ago, with all that is theirs."""
    ids = _old_runs(connection, state, age, limit)
    if not ids:
        return 0
    for table in _OF_A_RUN:
        connection.execute(delete(table).where(table.c.run_id.in_(ids)))
    return connection.execute(delete(_runs).where(_runs.c.id.in_(ids))).rowcount


def _old_runs(connection: Connection, state: str, age: timedelta, limit: int) -> Sequence[Any]:
    """The oldest of them, kept from other workers until this transaction ends."""
    old = (
        select(_ends.c.run_id)
        .where(_ends.c.state == state, _ends.c.finished_at < database_now(connection) - age)
        .order_by(_ends.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return connection.execute(old).scalars().all()


def forget_skips(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Delete the oldest skips whose last instant is longer than `age` ago."""
    return _forget(connection, "skips", "skipped_until", age, limit)


def forget_logs(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Delete the oldest lines of runs' logs, also of runs that are kept."""
    return _forget(connection, "run_logs", "at", age, limit)


def _forget(connection: Connection, table: str, at: str, age: timedelta, limit: int) -> int:
    statement = _OLDEST["postgresql" if is_postgresql(connection) else "sqlite"]
    before = bindparam("before", database_now(connection) - age, type_=tables.Instant())
    query = text(statement.format(table=table, at=at)).bindparams(before)
    return connection.execute(query, {"limit": limit}).rowcount
