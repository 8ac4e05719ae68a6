"""Measures starts by the client: over HTTP, and from an outbox by a relay.

    .venv/bin/python -m bench.outbox [--starts N] [--at-once N]

One API (`serve`), no worker, and this process with the client and the relay, on one PostgreSQL that syncs
to disk. Over HTTP `--at-once` starts are under way; a relay sends those of one definition one by one, and of
50 definitions eight at once. The outbox is on that PostgreSQL, in a database of its own, and on SQLite.

Prints starts a second, and microseconds of processor for each: of this process, of the API and of PostgreSQL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import httpx
import psycopg

from bench.installation import Installation, installation
from bench.server import processor_time
from tests.fakes.ports import free_port
from worker.client import AsyncClient, Outbox
from worker.client.statements import Dialect

ORGS = 50
BATCH = 100
PARAMS = {"order": "o-1234567", "amount": 1200, "lines": [1, 2, 3]}


class Api:
    """The API as a process, and what all processes together have used."""

    def __init__(self, made: Installation) -> None:
        self.made, self.port = made, free_port()
        self.command = [sys.executable, "-m", "worker", "--config", str(made.folder / "worker.toml")]
        added = subprocess.run(
            [*self.command, "operators", "add", "bench", "--role", "starter", "-o", "json"],
            check=True,
            capture_output=True,
        )
        self.token: str = json.loads(added.stdout)["token"]

    @contextmanager
    def serving(self) -> Iterator[None]:
        set_ = ["--set", f"web.listen=127.0.0.1:{self.port}", "--set", "web.calls_per_second=100000"]
        self.process = subprocess.Popen([*self.command, *set_, "serve"], stderr=subprocess.DEVNULL)
        try:
            while not self._is_up():
                time.sleep(0.1)
            yield
        finally:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/livez").status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> AsyncClient:
        return AsyncClient(f"http://127.0.0.1:{self.port}", self.token)

    def used(self) -> tuple[float, float, float]:
        """Processor seconds of this process, of the API and of PostgreSQL."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        return own.ru_utime + own.ru_stime, processor_time(self.process.pid), self.made.server_cpu()


async def say(api: Api, what: str, count: int, work: Callable[[], Awaitable[object]]) -> None:
    """Print how many starts a second the work makes, and what each takes."""
    before, began = api.used(), time.perf_counter()
    await work()
    took = time.perf_counter() - began
    own, of_api, of_server = (
        1e6 * (now - then) / count for now, then in zip(api.used(), before, strict=True)
    )
    print(
        f"{what:<44} {count / took:6.0f} a second; processor: client {own:.0f}, API {of_api:.0f}, "
        f"PostgreSQL {of_server:.0f} us each; load {os.getloadavg()[0]:.0f}",
        flush=True,
    )


async def over_http(api: Api, count: int, at_once: int) -> None:
    async with api.client() as client:
        numbers = iter(range(count))

        async def some() -> None:
            for number in numbers:
                await client.start(f"org_{number % ORGS}", f"d{number % ORGS}", PARAMS, key=f"http {number}")

        await say(
            api,
            f"over HTTP, {at_once} at once",
            count,
            lambda: asyncio.gather(*(some() for _ in range(at_once))),
        )


def filled(outbox: Outbox, connection: Any, count: int, orgs: int, name: str) -> float:
    """Insert starts of so many definitions; returns the median milliseconds of one in an open transaction."""
    times = []
    for number in range(count):
        began = time.perf_counter()
        outbox.start(
            connection, f"org_{number % orgs}", f"d{number % orgs}", PARAMS, key=f"{name} {orgs} {number}"
        )
        times.append(time.perf_counter() - began)
        if number % BATCH == BATCH - 1:
            connection.commit()
    connection.commit()
    return statistics.median(times) * 1000


async def by_relay(api: Api, dialect: Dialect, connect: Callable[[], Any], count: int) -> None:
    outbox = Outbox(dialect, connect=connect)
    with closing(connect()) as connection:
        cursor = connection.cursor()
        for statement in outbox.ddl:
            cursor.execute(statement)
        connection.commit()
        async with api.client() as client:
            for orgs in (ORGS, 1):
                some = count if orgs > 1 else count // 4
                inserted = filled(outbox, connection, some, orgs, outbox.dialect)
                print(f"an insert into the outbox, {outbox.dialect:<24} {inserted:.3f} ms")
                where = f"by a relay, {outbox.dialect}, {orgs} definition{'s' * (orgs > 1)}"
                await say(
                    api, where, some, lambda: client.relay(outbox, once=True, report=lambda *_, **__: None)
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--starts", type=int, default=2_000)
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    with installation("postgresql", orgs=ORGS) as made:
        made.define("bench.inline", spec={"overlap": "allow"})
        with made.workers():
            # It stores which handlers there are.
            made.add_backlog(1, "bench.inline", "inline", vacuum=False)
            made.wait_for_end(1)
        api = Api(made)
        with api.serving(), made.new_database() as url:
            asyncio.run(over_http(api, given.starts, given.at_once))
            file = made.folder / "shop.db"
            asyncio.run(by_relay(api, "postgresql", lambda: psycopg.connect(url), given.starts))
            connect = partial(sqlite3.connect, file, timeout=30, check_same_thread=False)
            asyncio.run(by_relay(api, "sqlite", connect, given.starts))


if __name__ == "__main__":
    main()
