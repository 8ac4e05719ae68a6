"""Measures what viewers of the console cost a worker: lateness of firing, processor time, memory.

    .venv/bin/python -m bench.viewers [--database sqlite|postgresql] [--viewers N] [--due N] [--seconds S]
        [--of runs|overview]

So many definitions are due each second, spread, inline no-ops. Meanwhile nobody watches, or N event
streams of 20 runs that log ten lines a second each; the two alternate in one worker. With `--of
overview` nothing is logged, and the streams are those of N open Overviews, each in its own session.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import psutil
from sqlalchemy import insert, select, update

from bench.installation import Installation, installation
from bench.schedules import PERIOD, share_below, store
from tests.fakes.ports import free_port
from worker.features.console.live import MAX_STREAMS
from worker.store import tables

TOKEN = "token-of-the-viewers"  # noqa: S105 - of this measurement
RUNS = 20
ROUNDS = 2
# Of an operator: both are below the limits of a caller.
SESSIONS = 40


def configure(made: Installation, port: int) -> None:
    """Let the worker serve operators with the token."""
    file = made.folder / "worker.toml"
    web = f"""[web]
listen = "127.0.0.1:{port}"
connections_per_address = 0
calls_per_second = 1000
logins_per_minute = 1000
"""
    for number in range(MAX_STREAMS // SESSIONS):
        digest = hashlib.sha256(f"{TOKEN}{number}".encode()).hexdigest()
        web += f'[[web.operators]]\nname = "viewer-{number}"\nrole = "viewer"\ntoken_sha256 = "{digest}"\n'
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


def token_of(viewer: int) -> str:
    return f"{TOKEN}{viewer // SESSIONS}"


async def overview(port: int, viewer: int) -> tuple[str, str]:
    """Log in and open the Overview; the address of its stream, and the header of the session."""
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, headers={"origin": base}, timeout=60) as client:
        csrf = re.search(r'name="csrf" value="([^"]+)"', (await client.get("/")).text)
        await client.post("/login", data={"token": token_of(viewer), "csrf": csrf[1] if csrf else ""})
        page = await client.get("/")
        if (path := re.search(r'data-stream="([^"]+)"', page.text)) is None:
            raise SystemExit(f"an Overview has no stream: {page.status_code}")
        return path[1], "; ".join(f"{name}={value}" for name, value in client.cookies.items())


async def opened(port: int, path: str, header: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream that the server has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head:
        raise SystemExit(f"a viewer was refused: {head[:200]!r}")
    # Without its writer, the connection would be closed.
    return reader, writer


async def view_all(port: int, runs: list[str], viewers: int, after: int) -> None:
    """Open so many streams, of runs or without them of Overviews, and say so; at the end of the input, how
    many events came.
    """
    asked = []
    for viewer in range(viewers):
        if runs:
            path = f"/api/v1/runs/{runs[viewer % len(runs)]}/events?after=1.{after}"
            asked.append((path, f"Authorization: Bearer {token_of(viewer)}"))
        else:
            path, cookies = await overview(port, viewer)
            asked.append((path, f"Cookie: {cookies}"))
    streams = [await opened(port, path, header) for path, header in asked]
    print("open", flush=True)

    events = 0

    async def read(stream: asyncio.StreamReader) -> None:
        nonlocal events
        while part := await stream.read(65536):
            events += part.count(b"event: ")

    tasks = [asyncio.create_task(read(reader)) for reader, _ in streams]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(events, flush=True)
    for task in tasks:
        task.cancel()


@contextlib.contextmanager
def viewing(port: int, runs: list[str], viewers: int, after: int) -> Iterator[None]:
    """So many streams, read by another process; prints how many events they had."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.viewers", "--read", f"{port}:{viewers}:{after}:{','.join(runs)}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout is None or process.stdout.readline() != "open\n":
            raise SystemExit("the viewers have ended")
        time.sleep(3)
        yield
    finally:
        print(f"{process.communicate()[0].strip()} events", flush=True)


def late_between(made: Installation, since: datetime, until: datetime) -> list[float]:
    runs = tables.runs
    query = select(runs.c.available_at, runs.c.started_at).where(
        runs.c.available_at >= since, runs.c.available_at < until, runs.c.started_at.is_not(None)
    )
    with made.database.autocommit() as connection:
        found = connection.execute(query).all()
    return sorted((started - available).total_seconds() * 1000 for available, started in found)


def measure(dialect: str, viewers: int, due: int, seconds: float, *, of_runs: bool) -> None:
    port = free_port()
    with installation(dialect, orgs=100) as made:
        configure(made, port)
        runs = watched_runs(made) if of_runs else []
        store(made, due * PERIOD, f"every {PERIOD}s", due=True)
        with made.workers() as working:
            time.sleep(10 + PERIOD)
            memory = psutil.Process(working.processes[0].pid)
            for turn in range(ROUNDS * 2):
                watch = turn % 2 == 1
                with contextlib.ExitStack() as stack:
                    first = 1 + turn * 100_000
                    if of_runs:
                        stack.enter_context(logging(made, runs, first))
                    if watch:
                        stack.enter_context(viewing(port, [run for run, _ in runs], viewers, first))
                    since, cpu = datetime.now(UTC), working.cpu()
                    time.sleep(seconds)
                    until, core = datetime.now(UTC), (working.cpu() - cpu) / seconds
                    rss = memory.memory_info().rss / 2**20
                time.sleep(1)
                late = late_between(made, since, until)
                print(
                    f"{dialect}, {viewers if watch else 0:>4} viewers: {len(late)} runs, late p50 "
                    f"{share_below(late, 0.5):.0f} ms, p99 {share_below(late, 0.99):.0f} ms, "
                    f"{100 * core:.1f} % of a core, {rss:.0f} MiB, load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", default="sqlite")
    parser.add_argument("--viewers", type=int, default=200)
    parser.add_argument("--due", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--of", choices=("runs", "overview"), default="runs")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        port, viewers, after, ids = options.read.split(":")
        asyncio.run(view_all(int(port), ids.split(",") if ids else [], int(viewers), int(after)))
        return
    measure(options.database, options.viewers, options.due, options.seconds, of_runs=options.of == "runs")


if __name__ == "__main__":
    main()
