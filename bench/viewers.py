"""Measures what viewers of live logs cost a worker: lateness of firing, processor time, memory.

    .venv/bin/python -m bench.viewers [--database sqlite|postgresql] [--viewers N] [--due N] [--seconds S]

So many definitions are due each second, spread, inline no-ops. Meanwhile nobody watches, or N event
streams of 20 runs that log ten lines a second each; the two alternate in one worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psutil
from sqlalchemy import insert, select, update

from bench.installation import Installation, installation
from bench.schedules import PERIOD, share_below, store
from tests.fakes.ports import free_port
from worker.store import tables

TOKEN = "token-of-the-viewers"  # noqa: S105 - of this measurement
RUNS = 20
ROUNDS = 2


def configure(made: Installation, port: int) -> None:
    """Let the worker serve operators with the token."""
    file = made.folder / "worker.toml"
    web = f"""[web]
listen = "127.0.0.1:{port}"
connections_per_address = 0
calls_per_second = 1000
[[web.operators]]
name = "viewer"
role = "viewer"
token_sha256 = "{hashlib.sha256(TOKEN.encode()).hexdigest()}"
"""
    file.write_text(file.read_text().replace('[web]\nlisten = ""\n', web))


def watched_runs(made: Installation) -> list[tuple[str, str]]:
    """Runs that wait for a month: ids of run and org."""
    made.define("bench.child", spec={"isolation": "child"})
    made.add_backlog(RUNS, "bench.child", "child")
    later = datetime.now(UTC) + timedelta(days=30)
    live = tables.live_runs
    with made.database.transaction() as connection:
        connection.execute(update(live).where(live.c.handler == "bench.child").values(available_at=later))
        found = connection.execute(select(live.c.id, live.c.org_id).where(live.c.handler == "bench.child"))
        return [(id_, org_id) for id_, org_id in found]


@contextlib.contextmanager
def logging(made: Installation, runs: list[tuple[str, str]], first: int) -> Iterator[None]:
    """Ten lines a second for each run."""
    stop = threading.Event()

    def write() -> None:
        seq = first
        while not stop.wait(1.0):
            now = datetime.now(UTC)
            common = {"attempt": 1, "at": now, "level": "info", "source": "log"}
            rows = [
                common
                | {"run_id": run, "org_id": org, "seq": seq + number, "text": f"line {seq + number} " * 8}
                for run, org in runs
                for number in range(10)
            ]
            with made.database.transaction() as connection:
                connection.execute(insert(tables.run_logs), rows)
            seq += 10

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def view(port: int, run: str, after: int) -> None:
    """One stream, read to its end; prints nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path = f"/api/v1/runs/{run}/events?after=1.{after}"
    headers = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    writer.write(f"GET {path} HTTP/1.1\r\n{headers}\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head:
        raise SystemExit(f"a viewer was refused: {head[:200]!r}")
    while await reader.read(65536):
        pass


async def view_all(port: int, runs: list[str], viewers: int, after: int) -> None:
    await asyncio.gather(*(view(port, runs[number % len(runs)], after) for number in range(viewers)))


@contextlib.contextmanager
def viewing(port: int, runs: list[tuple[str, str]], viewers: int, after: int) -> Iterator[None]:
    """So many streams, read by another process."""
    ids = ",".join(run for run, _ in runs)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.viewers", "--read", f"{port}:{viewers}:{after}:{ids}"]
    )
    time.sleep(3)
    if process.poll() is not None:
        raise SystemExit("the viewers have ended")
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def late_between(made: Installation, since: datetime, until: datetime) -> list[float]:
    runs = tables.runs
    query = select(runs.c.available_at, runs.c.started_at).where(
        runs.c.available_at >= since, runs.c.available_at < until, runs.c.started_at.is_not(None)
    )
    with made.database.autocommit() as connection:
        found = connection.execute(query).all()
    return sorted((started - available).total_seconds() * 1000 for available, started in found)


def measure(dialect: str, viewers: int, due: int, seconds: float) -> None:
    port = free_port()
    with installation(dialect, orgs=100) as made:
        configure(made, port)
        runs = watched_runs(made)
        store(made, due * PERIOD, f"every {PERIOD}s", due=True)
        with made.workers() as working:
            time.sleep(10 + PERIOD)
            memory = psutil.Process(working.processes[0].pid)
            for turn in range(ROUNDS * 2):
                watch = turn % 2 == 1
                with contextlib.ExitStack() as stack:
                    first = 1 + turn * 100_000
                    stack.enter_context(logging(made, runs, first))
                    if watch:
                        stack.enter_context(viewing(port, runs, viewers, first))
                    since, cpu = datetime.now(UTC), working.cpu()
                    time.sleep(seconds)
                    until, core = datetime.now(UTC), (working.cpu() - cpu) / seconds
                    rss = memory.memory_info().rss / 2**20
                time.sleep(1)
                late = late_between(made, since, until)
                print(
                    f"{dialect}, {viewers if watch else 0:>4} viewers: {len(late)} runs, late p50 "
                    f"{share_below(late, 0.5):.0f} ms, p99 {share_below(late, 0.99):.0f} ms, "
                    f"{100 * core:.0f} % of a core, {rss:.0f} MiB, load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", default="sqlite")
    parser.add_argument("--viewers", type=int, default=200)
    parser.add_argument("--due", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        port, viewers, after, ids = options.read.split(":")
        asyncio.run(view_all(int(port), ids.split(","), int(viewers), int(after)))
        return
    measure(options.database, options.viewers, options.due, options.seconds)


if __name__ == "__main__":
    main()
