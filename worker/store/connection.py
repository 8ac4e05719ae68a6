"""Small helpers for statements: the driver, the time, chunks of parameters, upsert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, text
from sqlalchemy.dialects import postgresql, sqlite

from worker.clock import Clock

CLOCK = "clock"


def driver(connection: Connection) -> Any:
    """The driver's own connection underneath, inside the same transaction.

    The hot statements are fixed text in batches; the driver alone runs them in half the time.
    """
    return connection.connection.driver_connection


def is_postgresql(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"


def database_now(connection: Connection) -> datetime:
    """The instant that this database's rows are compared with.

    PostgreSQL's own clock; on SQLite, which has one worker, the injected one.
    """
    if is_postgresql(connection):
        instant: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        return instant
    return file_now(connection)


def file_now(connection: Connection) -> datetime:
    """The injected clock of a SQLite connection."""
    clock: Clock = connection.info[CLOCK]
    return clock.now()


T = TypeVar("T")


def chunks(values: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    """The values in order, at most `size` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def upsert(
    connection: Connection, table: Table, key: Sequence[str], replaced: Sequence[str]
) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that sets the `replaced` columns of the row that already has this key."""
    if connection.dialect.name == "postgresql":
        statement = postgresql.insert(table)
        return statement.on_conflict_do_update(
            index_elements=list(key), set_={name: statement.excluded[name] for name in replaced}
        )
    other = sqlite.insert(table)
    return other.on_conflict_do_update(
        index_elements=list(key), set_={name: other.excluded[name] for name in replaced}
    )
