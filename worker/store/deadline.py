"""A PostgreSQL connection that waits for no answer longer than its deadline.

Keepalives find a peer that is gone; one that hangs and still acknowledges is found
only by a clock on this side. The connection is then closed, since nobody can say how
far the statement came.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.types.string import TextLoader

T = TypeVar("T")

_NOTHING_READY = 0


class DeadlineConnection(psycopg.Connection[Any]):
    """Every wait on the network, COMMIT's included, ends within `deadline` seconds."""

    deadline: float = 10.0

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        try:
            return super().wait(_bounded(gen, self.deadline), *arguments, **options)
        except _DeadlinePassed:
            self.pgconn.finish()
            raise psycopg.OperationalError(
                f"the database did not answer within {self.deadline:g} s; the connection is closed"
            ) from None


class _DeadlinePassed(Exception):
    """The generator of a wait has had its time."""


def _bounded(gen: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    until = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            # An answer that is there is taken, however late: this process may have been stopped.
            if ready == _NOTHING_READY and time.monotonic() >= until:
                raise _DeadlinePassed
            wanted = gen.send(ready)
    except StopIteration as end:
        value: T = end.value
        return value


def connect(arguments: Mapping[str, str], *, deadline: float) -> DeadlineConnection:
    """A connection with libpq's arguments, on which identifiers come as text."""
    connection = DeadlineConnection.connect(make_conninfo(**arguments))
    connection.deadline = deadline
    connection.adapters.register_loader("uuid", TextLoader)
    return connection
