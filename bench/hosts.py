"""Measures what hosts cost the worker that answers them, with PostgreSQL.

    .venv/bin/python -m bench.hosts [--hosts N] [--runs N] [--every SECONDS] [--seconds N] [--profile FILE]
        [--waiting]   instead: hosts that wait for runs, of which there are none

The hosts hold the runs, in equal parts. A process of its own sends their renewals, evenly over time; this
one is a worker without loops. Prints its processor time in percent of a core, and the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, cast

from bench.filling import HANDLER, Filled, filled
from worker.clock import SystemClock
from worker.engine.attempt.plan import HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.loops.step_writer import StepWriter
from worker.engine.trial import FakeTokens
from worker.features.hosts.attempt_api import AttemptApi
from worker.features.hosts.operations import add_host
from worker.features.hosts.wire import PREFIX
from worker.features.hosts.worker_wiring import AttemptListener
from worker.handlers.catalogue import HandlerEntry
from worker.ids import WorkerId, new_id
from worker.model.runs.hosts import HostCaller
from worker.settings import Settings
from worker.settings.sections import AttemptsSettings, ExecutionSettings
from worker.store import catalogue, host_handlers, hosts, sign_in
from worker.store.ring_walk import RingWalk
from worker.store.worker_store import WorkerStore
from worker.telemetry import logs
from worker.tokens.sealing import KeyRing

ADDRESS = "127.0.0.1:18473"
LEASE = timedelta(hours=1)
ENTRY = HandlerEntry(HANDLER, "bench", "1", "bench:inline", isolation="inline")


def with_hosts(database: Filled, count: int, runs: int) -> list[tuple[str, str]]:
    """Hosts that hold these runs together: the token and incarnation of each."""
    database.add_orgs(100)
    database.add_waiting(runs)
    made: list[tuple[str, str]] = []
    for n in range(count):
        token = add_host(database.database, f"h{n}", "default", actor="bench")["token"]
        worker = WorkerId(new_id())
        with database.database.transaction() as connection:
            caller = cast(HostCaller, hosts.find(connection, sign_in.sha256(token), None))
            capacity = {"children": 0, "inline": runs}
            hosts.begin(
                connection, caller, worker, lease=LEASE, capacity=capacity, host="h", pid=1, version="1"
            )
            catalogue.put(connection, [ENTRY], at=database.database.now(connection))
            host_handlers.report(connection, worker, [ENTRY])
        walk = RingWalk(database.database, worker)
        left = runs // count
        while left > 0:
            left -= len(walk.admit({HANDLER: None}, {"inline": left}))
        made.append((token, worker))
    database.settle()
    return made


def listener_of(database: Filled, ring: KeyRing) -> AttemptListener:
    clock = SystemClock()
    store = WorkerStore(database.database, WorkerId(new_id()), timedelta(seconds=30))
    tools = Tools(
        plans=Plans(store, clock, api_origins={"main": ()}),
        tokens=FakeTokens(clock),
        handlers=HandlerRegistry(),
        runners={},
        store=store,
        steps=StepWriter(store, clock),
        run_log=RunLogWriter(store, clock),
        clock=clock,
        random=Random(1),  # noqa: S311
    )
    settings = Settings(attempts=AttemptsSettings(listen=ADDRESS), execution=ExecutionSettings())
    listener = AttemptListener(settings.attempts, clock)
    listener.bind()
    listener.attempts.api = listener.api(store, tools, settings, lambda _: ring, lambda *_: None)
    return listener


async def measure(
    database: Filled, callers: list[tuple[str, str]], every: float, seconds: float, waiting: bool
) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        listener = listener_of(database, KeyRing.generate(Path(folder) / "keyring"))
        async with listener.serving():
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.hosts", "--client"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ,
            )
            to_client, of_client = cast(Any, client.stdin), cast(Any, client.stdout)
            to_client.write(json.dumps([callers, every, seconds, waiting]).encode() + b"\n")
            await of_client.readline()  # each has renewed once
            server = database.server_cpu()
            began, cpu = time.monotonic(), time.process_time()
            answered = json.loads(await of_client.readline())
            took = time.monotonic() - began
            cpu, server = time.process_time() - cpu, database.server_cpu() - server
            await client.wait()
        await cast(AttemptApi, listener.attempts.api).close()
    return {
        "renewals": answered["renewals"],
        "runs": answered["runs"],
        "worker_percent": round(100 * cpu / took, 2),
        "server_percent": round(100 * server / took, 2),
        "worker_ms": round(1000 * cpu / answered["renewals"], 2),
    }


async def play_hosts(callers: list[tuple[str, str]], every: float, seconds: float, waiting: bool) -> None:
    """Renew for each of these hosts, or wait for runs, over a connection each."""
    host, _, port = ADDRESS.partition(":")
    renewals, runs = 0, 0
    call, asked, key = "renew", b"{}", "owned"
    if waiting:
        # Nearly as long as the time between two calls.
        wait = {"free": {"inline": 10}, "wait": 0.9 * every}
        call, asked, key = "take", json.dumps(wait).encode(), "attempts"

    async def renew(
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], token: str, worker: str
    ) -> int:
        reader, writer = streams
        head = (
            f"POST {PREFIX}/{call} HTTP/1.1\r\nHost: {ADDRESS}\r\nAuthorization: Bearer {token}\r\n"
            f"OrgWorker-Incarnation: {worker}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(asked)}\r\n\r\n"
        )
        writer.write(head.encode() + asked)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        [length] = [line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = json.loads(await reader.readexactly(int(length.partition(b":")[2])))
        return len(body[key])

    async def play(n: int, token: str, worker: str) -> None:
        nonlocal renewals, runs
        streams = await asyncio.open_connection(host, int(port), limit=2**24)
        held = await renew(streams, token, worker)
        runs += held
        ready[n].set()
        await begun.wait()
        due = time.monotonic() + every * n / len(callers)
        while due < ends_at:
            await asyncio.sleep(due - time.monotonic())
            if await renew(streams, token, worker) != held:
                raise RuntimeError("a host does not hold its runs any more")
            renewals += 1
            due += every
        streams[1].close()

    ready, begun = [asyncio.Event() for _ in callers], asyncio.Event()
    ends_at = float("inf")
    tasks = [asyncio.create_task(play(n, *caller)) for n, caller in enumerate(callers)]
    for event in ready:
        await event.wait()
    print("ready", flush=True)
    ends_at = time.monotonic() + seconds
    begun.set()
    await asyncio.gather(*tasks)
    print(json.dumps({"renewals": renewals, "runs": runs}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two renewals of a host")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--waiting", action="store_true", help="take instead of renew")
    parser.add_argument("--profile", help="cProfile's output")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        asyncio.run(play_hosts(*json.loads(sys.stdin.readline())))
        return
    logs.configure("json", level="error")
    with filled("postgresql") as database:
        callers = with_hosts(database, given.hosts, given.runs)
        work = measure(database, callers, given.every, given.seconds, given.waiting)
        if given.profile:
            profile = cProfile.Profile(time.process_time)
            profile.enable()
            found = asyncio.run(work)
            profile.disable()
            profile.dump_stats(given.profile)
        else:
            found = asyncio.run(work)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
