"""Measures limits of other services with real workers' shares: the rate that is used, and the bound.

    .venv/bin/python -m bench.limits [--seconds N] [--workers N] [--orgs N] [--quiet]

Worker processes with a pacer and shares on one PostgreSQL send datagrams for N orgs to a service, which
counts them: to one origin with a limit for each org, to another with one for all. Work waits everywhere, all
the time. Workers are frozen for a while, or killed and started again (`--quiet`: neither).

Prints how much of each rate was used, and the worst window of 10 s or more against the bound of
rate * (w + 1 s) + burst, by the service's own clock. Exits with 1 if the bound was broken, or if less than
95 % of the rate was used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.server import own_server, processor_time
from worker.clock import SystemClock
from worker.features.egress.pacing import Pacer
from worker.features.egress.shares import Shares
from worker.handlers.results import RateLimited
from worker.ids import new_id
from worker.model.limits import Limit
from worker.store import limits, schema
from worker.store.database import Database

OF_ORG, OF_ALL = "https://org.example", "https://all.example"
RATES = {OF_ORG: ("2/s", 2), OF_ALL: ("200/s", 50)}
# The shortest window that the bound is for, and the part of the rate that is used at least.
WINDOW = 10.0
USED = 0.95
# Seconds that a worker is frozen: shorter and longer than its shares last.
FREEZES = (0.3, 1.5, 4.0)
# Requests of each org that wait at each worker, for each origin.
WAITING = 2
# Seconds until all workers wait, which are not counted as used.
WARM = 3.0


@dataclass
class Service:
    """Counts datagrams by key when they arrive, on its own clock."""

    socket: socket.socket
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.socket.recv(200):
                self.times[data.decode()].append(time.monotonic())


def worst_window(times: Sequence[float], rate: float, burst: int) -> tuple[float, float]:
    """The requests above the bound in the worst window (below 0: it holds), and its length in seconds."""
    worst, length, lowest, lowest_at, first = -float("inf"), WINDOW, float("inf"), 0.0, 0
    window = 0
    for place, at in enumerate(times):
        # A window of exactly 10 s that ends here.
        while times[window] < at - WINDOW:
            window += 1
        over = place - window + 1 - (rate * (WINDOW + 1) + burst)
        # Longer ones, that begin at an earlier request: the one with the least `number - rate * time`.
        while times[first] <= at - WINDOW:
            if first - rate * times[first] < lowest:
                lowest, lowest_at = first - rate * times[first], times[first]
            first += 1
        longer = place + 1 - rate * at - lowest - rate - burst
        if over > worst:
            worst, length = over, WINDOW
        if longer > worst:
            worst, length = longer, at - lowest_at
    return worst, length


def work(url: str, port: int, orgs: Sequence[str]) -> None:
    """One worker: keep requests of all orgs waiting, until it is killed."""
    clock = SystemClock()
    sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sending.connect(("127.0.0.1", port))

    async def send(pacer: Pacer, org: str, limit: Limit) -> None:
        key = org if limit.per == "org" else "all"
        while True:
            try:
                slot = await pacer.acquire(org, limit.origin, [limit], float("inf"))
            except RateLimited as limited:
                await clock.sleep(limited.retry_after)
                continue
            # As the broker does: late by the clock is not sent.
            if clock.monotonic() < slot.until:
                sending.send(f"{limit.origin} {key}".encode())
            slot.release()

    async def main() -> None:
        database = Database.open(url, clock=clock)
        leased = Shares(database, new_id(), clock)
        pacer = Pacer(clock, leased.share)
        found = await leased.limits()
        async with asyncio.TaskGroup() as group:
            for org in orgs:
                for limit in found:
                    for _ in range(WAITING):
                        group.create_task(send(pacer, org, limit))

    asyncio.run(main())


class Fleet:
    """Worker processes that are frozen, killed and started again."""

    def __init__(self, arguments: Sequence[str], count: int) -> None:
        self._arguments = arguments
        self.processes = [self._start() for _ in range(count)]
        self.freezes = self.kills = 0
        self.cpu = 0.0

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "bench.limits", "--worker", *self._arguments])

    def disturb(self, seconds: float) -> None:
        """Freeze or kill one worker after the other, with pauses between."""
        chance, until = random.Random(7), time.monotonic() + seconds  # noqa: S311
        while time.monotonic() + 6 < until:
            time.sleep(chance.uniform(1, 3))
            place = chance.randrange(len(self.processes))
            process = self.processes[place]
            if chance.random() < 0.6:
                self.freezes += 1
                process.send_signal(signal.SIGSTOP)
                time.sleep(chance.choice(FREEZES))
                process.send_signal(signal.SIGCONT)
            else:
                self.kills += 1
                self._end(process)
                self.processes[place] = self._start()
        time.sleep(max(until - time.monotonic(), 0))

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(Exception):
            self.cpu += processor_time(process.pid)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for process in self.processes:
            self._end(process)


@contextlib.contextmanager
def service() -> Iterator[tuple[Service, int]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
        listening.bind(("127.0.0.1", 0))
        counting = Service(listening)
        thread = threading.Thread(target=counting.serve, daemon=True)
        thread.start()
        yield counting, listening.getsockname()[1]


def judge(counting: Service, limit: Limit, orgs: int, start: float, end: float) -> bool:
    """Print what the service saw of one origin; returns whether it is as it must be."""
    rate = limit.rate or 0.0
    keys = orgs if limit.per == "org" else 1
    seen = {key: times for key, times in counting.times.items() if key.startswith(limit.origin)}
    worst, length, of = max((*worst_window(times, rate, limit.burst), key) for key, times in seen.items())
    used = sum(start <= at < end for times in seen.values() for at in times)
    part = used / (rate * keys * (end - start))
    least = min((sum(start <= at < end for at in times) for times in seen.values()), default=0)
    print(
        f"{limit.origin} per {limit.per}: {used} requests of {len(seen)} keys, {part:.1%} of the rate, "
        f"the least of a key {least / (rate * (end - start)):.1%}"
    )
    print(f"  worst window: {length:.1f} s of {of}, {-worst:.1f} requests below the bound")
    return worst <= 0 and part >= USED and len(seen) == keys


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--orgs", type=int, default=200)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    orgs = [f"00000000-0000-7000-8000-{number:012}" for number in range(given.orgs)]
    if given.worker:
        work(given.url, given.port, orgs)
        return 0
    with own_server() as server, service() as (counting, port):
        url = server.url()
        schema.upgrade(url)
        database = Database.open(url, clock=SystemClock())
        with database.transaction() as connection:
            for origin, per in ((OF_ORG, "org"), (OF_ALL, "all")):
                rate, burst = RATES[origin]
                values = {"origin": origin, "per": per, "rate": rate, "burst": burst, "max_wait": "1h"}
                limits.put(connection, values, None, at=database.now(connection), actor="bench")
            found = list(limits.load(connection).values())
        database.close()
        options = ["--url", url, "--port", str(port), "--orgs", str(given.orgs)]
        fleet = Fleet(options, given.workers)
        try:
            time.sleep(WARM)
            start = time.monotonic()
            time.sleep(given.seconds) if given.quiet else fleet.disturb(given.seconds)
            end = time.monotonic()
        finally:
            fleet.stop()
        print(
            f"{given.workers} workers, {given.orgs} orgs, {end - start:.0f} s, {fleet.freezes} freezes, "
            f"{fleet.kills} kills; {fleet.cpu / (end - start + WARM):.2f} processors for all workers; "
            f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}"
        )
        return 0 if all([judge(counting, limit, given.orgs, start, end) for limit in found]) else 1


if __name__ == "__main__":
    sys.exit(main())
