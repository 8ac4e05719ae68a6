"""The adapter of orgworker: a worker process, and a producer that makes runs as the command line does.

    DATABASE_URL=… BENCH_PROVIDER=URL BENCH_FOLDER=DIR python -m bench.outside.orgworker

The handler is inline: a job is 1 ms of waiting, the peers call theirs in the worker's process too, and a
child would be a fork for each. At a fixed rate each job is one `definitions run`, a transaction of its own
with its audit row; no call makes many at once. At a target depth each org has a backfill that keeps its share
unfinished. The worker reports each call over a pipe. It dies with this process, so that a kill strikes both.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import text

from bench.installation import AUDIENCE, Installation
from bench.outside.contract import Pace, Settings, Telemetry, end_with_harness
from tests.fakes.plugins import make_plugin
from worker import release
from worker.clock import SystemClock
from worker.demo.provider import Application
from worker.errors import WorkerError
from worker.operations.backfill import backfill
from worker.operations.runs import run_now
from worker.store import schema
from worker.store.database import Database

ORGS = 20
# Sessions that make runs at a time: one definition is locked by one.
PRODUCERS = 4
# As long as the outside adapters of the peers wait for a worker that has died.
LEASE = 'lease = "15s"\nrenew = "3s"\ndrain = "2s"'
TABLES = ["public.live_runs", "public.runs", "public.attempts"]
HANDLERS = """\
import asyncio
import functools
import os
import time

from worker import job


@functools.cache
def pipe():
    return os.open({pipe!r}, os.O_WRONLY)


@job("bench.inline", isolation="inline")
async def inline(ctx):
    # The id has the time of its making.
    claimed = time.time() * 1000 - int(ctx.run.id.replace("-", "")[:12], 16)
    await asyncio.sleep({seconds!r})
    os.write(pipe(), b"%.1f\\n" % claimed)
"""


def applications() -> Iterator[Application]:
    """The clients of the orgs at the identity provider."""
    for number in range(ORGS):
        yield Application(f"org_{number}", f"client-{number}", f"secret-of-{number}", audiences=(AUDIENCE,))


class Adapter:
    """One replica: its installation, its worker and its producer."""

    def __init__(self, settings: Settings, folder: Path, provider_url: str) -> None:
        self._settings = settings
        self._folder = folder / f"replica-{settings.instance}"
        self._folder.mkdir(exist_ok=True)
        self._made = Installation(folder, settings.database_url, provider_url, None)
        self._database = Database.open(
            settings.database_url, clock=SystemClock(), role="bench", threads=PRODUCERS + 1
        )
        self._telemetry = Telemetry("orgworker", settings, self._depth)
        self._stopped = threading.Event()

    def run(self) -> int:
        """Work until SIGTERM; returns 1 if the worker ended before."""
        if not self._settings.instance:
            self._install()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopped.set())
        end_with_harness()
        process = self._start_worker()
        while not self._is_registered(process.pid) and process.poll() is None:
            time.sleep(0.1)
        self._telemetry.describe(tables=TABLES, version=release.version())
        self._telemetry.start()
        producer = threading.Thread(target=self._produce, daemon=True)
        producer.start()
        while not self._stopped.wait(0.2) and process.poll() is None:
            pass
        ended_before = not self._stopped.is_set()
        self._stopped.set()
        process.terminate()
        try:
            process.wait(4)
        except subprocess.TimeoutExpired:
            process.kill()
        return int(ended_before)

    def _install(self) -> None:
        """Everything that replicas share, unless an earlier life of this one has made it."""
        if (self._made.folder / "worker.toml").exists():
            return
        schema.upgrade(self._settings.database_url)
        self._made.add_orgs(list(applications()), limit=10_000)
        self._made.define("bench.inline", spec={"overlap": "allow", "schedule": "every 1s"})
        self._made.configure(slots=self._settings.workers, extra=LEASE)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        while not (self._made.folder / "worker.toml").exists():
            time.sleep(0.1)
        pipe, plugins = self._folder / "pipe", self._folder / "plugins"
        if not plugins.exists():
            os.mkfifo(pipe)
            source = HANDLERS.format(pipe=str(pipe), seconds=self._settings.work_seconds)
            make_plugin(
                plugins,
                dist="orgworker-bench",
                modules={"orgworker_bench": source},
                entry_points={"bench.inline": "orgworker_bench:inline"},
            )
        # For writing too: it does not end with the worker that is killed.
        threading.Thread(target=self._count, args=(os.open(pipe, os.O_RDWR),), daemon=True).start()
        with (self._folder / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "worker", "--config", str(self._made.folder / "worker.toml"), "run"],
                env=os.environ | {"PYTHONPATH": str(plugins)},
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )

    def _is_registered(self, pid: int) -> bool:
        with self._database.autocommit() as connection:
            query = text("SELECT count(*) FROM workers WHERE pid = :pid AND ended_at IS NULL")
            return bool(connection.execute(query, {"pid": pid}).scalar_one())

    def _count(self, pipe: int) -> None:
        with os.fdopen(pipe) as lines:
            for line in lines:
                self._telemetry.claimed(float(line))
                self._telemetry.completed()

    def _produce(self) -> None:
        if self._settings.mode != "fixed":
            self._fill()
            return
        pace, made = Pace(self._settings), 0
        with ThreadPoolExecutor(PRODUCERS) as sessions:
            while not self._stopped.wait(self._settings.batch_seconds):
                jobs = pace.due()
                self._telemetry.enqueued(sum(sessions.map(self._make_run, range(made, made + jobs))))
                made += jobs

    def _make_run(self, number: int) -> bool:
        try:
            run_now(self._database, f"org_{number % ORGS}", f"d{number % ORGS}", actor="bench")
        except WorkerError as error:
            print(f"[orgworker] no run made: {error}", file=sys.stderr)
            return False
        return True

    def _fill(self) -> None:
        """Start the backfills; the workers go on with them."""
        until = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        for number in range(ORGS if not self._settings.instance else 0):
            backfill(
                self._database,
                f"org_{number}",
                f"d{number}",
                start=until - timedelta(days=300),
                until=until,
                limit=max(1, self._settings.depth // ORGS),
                actor="bench",
            )

    def _depth(self) -> int:
        with self._database.autocommit() as connection:
            query = text("SELECT count(*) FROM live_runs WHERE state = 'waiting'")
            return int(connection.execute(query).scalar_one())


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(Adapter(Settings.read(), Path(os.environ["BENCH_FOLDER"]), os.environ["BENCH_PROVIDER"]).run())
