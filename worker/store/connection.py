"""What the statements of both dialects ask of a SQLAlchemy connection: its driver, and the time."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

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
