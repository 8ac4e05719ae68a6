"""Hints wake whoever listens, and sessions that ended while they rested are not handed out."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit

import psycopg

from tests.fakes.stock import Stock
from tests.faults.proxy import Proxy, Verdict
from worker.clock import SystemClock
from worker.store import definitions
from worker.store.database import Database
from worker.store.dialect import hint


async def test_a_change_of_what_is_due_is_a_hint_once_it_is_committed(postgres):
    stock, heard = Stock(postgres), asyncio.Queue()
    listening = asyncio.create_task(postgres.listen(lambda: heard.put_nowait(None)))
    await asyncio.wait_for(heard.get(), 10)  # reached the database
    org_id = stock.org()
    definition_id = stock.definition(org_id)

    with postgres.transaction() as connection:
        definitions.set_next(connection, [(org_id, definition_id, None, None)])
        hint(connection)
        await asyncio.sleep(0.1)
        assert heard.empty()

    await asyncio.wait_for(heard.get(), 10)
    await asyncio.sleep(0.1)
    assert heard.empty()
    await ended(listening)


async def test_a_listener_that_was_cut_off_listens_again(migrated_postgres_url):
    database = Database.open(migrated_postgres_url, clock=SystemClock())
    heard: asyncio.Queue[None] = asyncio.Queue()
    listening = asyncio.create_task(database.listen(lambda: heard.put_nowait(None)))
    await asyncio.wait_for(heard.get(), 10)

    terminate_all(migrated_postgres_url)

    await asyncio.wait_for(heard.get(), 10)
    await database.hint()
    await asyncio.wait_for(heard.get(), 10)
    await ended(listening)
    database.close()


async def test_a_listener_whose_question_is_never_answered_asks_on_another_connection(
    migrated_postgres_url, monkeypatch
):
    monkeypatch.setattr("worker.store.sessions.LISTEN_DEADLINE", 0.3)
    heard: asyncio.Queue[None] = asyncio.Queue()
    with Proxy(urlsplit(migrated_postgres_url).port) as proxy:
        proxy.watch = NeverAnswered
        url = urlsplit(migrated_postgres_url)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
        database = Database.open(url, clock=SystemClock())
        listening = asyncio.create_task(database.listen(lambda: heard.put_nowait(None)))

        await asyncio.wait_for(heard.get(), 10)

        assert NeverAnswered.left == 0
        await ended(listening)
        database.close()
        proxy.let_go()


class NeverAnswered:
    """Holds the first LISTEN that any client sends."""

    left = 1

    def sees(self, data: bytes) -> Verdict:
        if b"LISTEN" not in data or not self.left:
            return "pass"
        type(self).left -= 1
        return "hold"


def test_sessions_that_ended_while_they_rested_are_never_handed_out(postgres, migrated_postgres_url):
    stock = Stock(postgres)
    with postgres.autocommit(), postgres.autocommit(), postgres.autocommit():
        pass

    terminate_all(migrated_postgres_url)

    assert stock.org()


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def terminate_all(url: str) -> None:
    """End every other session of the database, and wait until they are gone."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid, 5000) {others}")
