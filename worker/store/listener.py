"""Hints between workers on PostgreSQL: "look now", said at most once a transaction.

A hint only makes somebody look sooner than at the next poll. Nothing depends on one:
it may be lost, late or for nothing. On SQLite there is one worker, which polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from worker.clock import Clock
from worker.store.connection import driver, is_postgresql

if TYPE_CHECKING:
    import psycopg

CHANNEL = "orgworker"
# Seconds before the next try to connect: the first, and at most.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 0.5
# Seconds that it waits for an answer.
DEADLINE = 10.0


def hint(connection: Connection) -> None:
    """Let every worker look for work as soon as this transaction is committed."""
    if is_postgresql(connection):
        # The same again in one transaction is sent once.
        driver(connection).execute("SELECT pg_notify(%s, '')", (CHANNEL,))


async def listen(arguments: dict[str, Any], clock: Clock, on_hint: Callable[[], None]) -> None:
    """Call `on_hint` at each hint and each time the database is reached; ends by cancellation only."""
    import psycopg

    pause = FIRST_PAUSE
    while True:
        try:
            connection = await psycopg.AsyncConnection.connect(**arguments, autocommit=True)
            try:
                await asyncio.wait_for(connection.execute(f"LISTEN {CHANNEL}"), DEADLINE)
                pause = FIRST_PAUSE
                await _hear(connection, on_hint)
            finally:
                await connection.close()
        except (psycopg.Error, TimeoutError):
            # The loops that ask the database report that it is lost; here nobody waits for it.
            await clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


async def _hear(connection: psycopg.AsyncConnection[Any], on_hint: Callable[[], None]) -> None:
    # Not `notifies()`: that looks ten times a second, and this for nothing while nothing comes.
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    socket, session = connection.fileno(), connection.pgconn
    loop.add_reader(socket, readable.set)
    try:
        on_hint()
        while True:
            await readable.wait()
            readable.clear()
            session.consume_input()
            heard = list(iter(session.notifies, None))
            if heard:
                on_hint()
    finally:
        loop.remove_reader(socket)
