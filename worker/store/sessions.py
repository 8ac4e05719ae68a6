"""PostgreSQL sessions: connections with a deadline, and the listener for hints.

Only this module imports psycopg at run time, and only PostgreSQL needs it: the driver is an optional extra.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.conninfo import make_conninfo
from psycopg.pq import Format
from psycopg.types.string import TextLoader

from worker.clock import Clock
from worker.store.dialect import CHANNEL
from worker.store.sql.postgresql.arrays import Instants, Uuids

T = TypeVar("T")

_NOTHING_READY = 0
# Seconds before the listener connects again: first and longest.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 0.5
# Seconds that the listener waits for an answer.
LISTEN_DEADLINE = 10.0


class DeadlineConnection(psycopg.Connection[Any]):
    """Every wait on the network, that of COMMIT included, ends within `deadline` seconds."""

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
    """A wait has reached its deadline."""


def _bounded(gen: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    until = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            # An answer that has arrived counts, however late: this process may have been stopped.
            if ready == _NOTHING_READY and time.monotonic() >= until:
                raise _DeadlinePassed
            wanted = gen.send(ready)
    except StopIteration as end:
        value: T = end.value
        return value


class _AsItIs(Dumper):
    """An array that is in PostgreSQL's binary form already."""

    format = Format.BINARY

    def dump(self, obj: Any) -> Buffer:
        return obj  # type: ignore[no-any-return]


class _UuidsDumper(_AsItIs):
    oid = psycopg.postgres.types["uuid"].array_oid


class _InstantsDumper(_AsItIs):
    oid = psycopg.postgres.types["timestamptz"].array_oid


def connect(arguments: Mapping[str, str], *, deadline: float) -> DeadlineConnection:
    """A connection with libpq's arguments; it returns identifiers as text."""
    connection = DeadlineConnection.connect(make_conninfo(**arguments))
    connection.deadline = deadline
    connection.adapters.register_loader("uuid", TextLoader)
    connection.adapters.register_dumper(Uuids, _UuidsDumper)
    connection.adapters.register_dumper(Instants, _InstantsDumper)
    return connection


async def listen(arguments: dict[str, Any], clock: Clock, on_hint: Callable[[], None]) -> None:
    """Call `on_hint` at each hint and after each connection; ends by cancellation only."""
    pause = FIRST_PAUSE
    while True:
        try:
            connection = await psycopg.AsyncConnection.connect(**arguments, autocommit=True)
            try:
                await asyncio.wait_for(connection.execute(f"LISTEN {CHANNEL}"), LISTEN_DEADLINE)
                pause = FIRST_PAUSE
                await _receive(connection, on_hint)
            finally:
                await connection.close()
        except (psycopg.Error, TimeoutError):
            # Not reported here: the loops that query the database report that it is lost.
            await clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


async def _receive(connection: psycopg.AsyncConnection[Any], on_hint: Callable[[], None]) -> None:
    # `notifies()` would poll ten times a second; this waits until the socket is readable.
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    socket, session = connection.fileno(), connection.pgconn
    loop.add_reader(socket, readable.set)
    try:
        on_hint()
        while True:
            await readable.wait()
            readable.clear()
            session.consume_input()
            if list(iter(session.notifies, None)):
                on_hint()
    finally:
        loop.remove_reader(socket)
