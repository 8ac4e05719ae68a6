"""The adapter of PgQueuer, run by the Python of the peers' virtual environment.

    DATABASE_URL=… VENV/bin/python -m bench.outside.pgqueuer

Producer and manager have a connection each. The manager is started again one second after a failure, as
`pgq run --restart-on-failure` does, which waits five.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import asyncpg
import psycopg
from pgqueuer import QueueManager
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from bench.outside.contract import Pace, Settings, Telemetry, end_with_harness

TABLES = ["public.pgqueuer", "public.pgqueuer_log"]
# As long as the other adapters wait for a worker that has died.
HEARTBEAT = timedelta(seconds=15)
DEPTH = "SELECT count(*) FROM pgqueuer WHERE status = 'queued'"
# Seconds until another try, and between two looks at the depth.
AGAIN = 1.0
LOOK = 0.05
BATCH = 100


class Adapter:
    """One replica: its manager and its producer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._telemetry = Telemetry("pgqueuer", settings, self._depth)
        self._stopped = asyncio.Event()
        self._manager: QueueManager | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        end_with_harness()
        if not self._settings.instance:
            queries = Queries(AsyncpgDriver(connection := await asyncpg.connect(self._settings.database_url)))
            if not await queries.schema_is_installed():
                await queries.install()
            await connection.close()
        self._telemetry.describe(tables=TABLES, version=version("pgqueuer"))
        self._telemetry.start()
        parts = [asyncio.create_task(self._always(part)) for part in (self._manage, self._produce)]
        await self._stopped.wait()
        await asyncio.wait(parts, timeout=4)

    def _stop(self) -> None:
        self._stopped.set()
        if self._manager is not None:
            self._manager.shutdown.set()

    async def _always(self, part) -> None:  # type: ignore[no-untyped-def]
        while not self._stopped.is_set():
            try:
                connection = await asyncpg.connect(self._settings.database_url)
                try:
                    await part(Queries(AsyncpgDriver(connection)))
                finally:
                    with contextlib.suppress(Exception):
                        await connection.close(timeout=1)
            except Exception as error:
                print(f"[pgqueuer] {part.__name__}: {error!r}", file=sys.stderr)
                await asyncio.sleep(AGAIN)

    async def _manage(self, queries: Queries) -> None:
        self._manager = manager = QueueManager(queries)

        @manager.entrypoint("bench")
        async def bench(job: Job) -> None:
            self._telemetry.claimed((datetime.now(UTC) - job.created).total_seconds() * 1000)
            await asyncio.sleep(self._settings.work_seconds)
            self._telemetry.completed()

        most = max(2, self._settings.workers)
        await manager.run(
            batch_size=min(BATCH, most // 2),
            max_concurrent_tasks=most,
            heartbeat_timeout=HEARTBEAT,
            shutdown_on_listener_failure=True,
        )

    async def _produce(self, queries: Queries) -> None:
        pace = Pace(self._settings)
        while not self._stopped.is_set():
            if self._settings.mode == "fixed":
                await asyncio.sleep(self._settings.batch_seconds)
                jobs = pace.due()
            else:
                (row,) = await queries.driver.fetch(DEPTH)
                jobs = max(0, self._settings.depth - row["count"])
                await asyncio.sleep(0 if jobs else LOOK)
            if jobs:
                await queries.enqueue(["bench"] * jobs, [None] * jobs, [0] * jobs)
                self._telemetry.enqueued(jobs)

    def _depth(self) -> int:
        with psycopg.connect(self._settings.database_url, autocommit=True) as connection:
            return int(connection.execute(DEPTH).fetchall()[0][0])


if __name__ == "__main__":
    asyncio.run(Adapter(Settings.read()).run())
