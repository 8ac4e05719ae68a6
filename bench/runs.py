"""Measures the cost of a run: start and end of its process, memory of many, and thousands inline.

    .venv/bin/python -m bench.runs [starts] [memory] [inline] [--database sqlite|postgresql]

`starts` counts from handing a run to the runner until its handler is called, and until its process
and all below it are gone; with and without spare children, and with and without the sandbox, in turn.
Between two runs it waits for `--pause`, in which spares are replaced. Faults are page faults of zygote and
run. `memory` is the proportional set size: what several share counts once.
`inline` has a real worker hold sleeping runs; its CPU is that of the whole worker, renewals each
second, with and without them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import psutil
from sqlalchemy import text

from bench.installation import Installation, installation
from tests.fakes.answering import AnsweringWorker
from tests.fakes.plugins import make_plugin
from tests.fakes.running import until, work
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.engine.runners.contract import StopSignal, Work

HANDLERS = """\
import asyncio
import time
from worker import job


@job("bench.noop")
async def noop(ctx):
    return None


@job("bench.waits")
def waits(ctx):
    time.sleep(3600)


@job("bench.inline", isolation="inline")
async def inline(ctx):
    await asyncio.sleep(3600)
"""
ENTRY_POINTS = {f"bench.{name}": f"bench_jobs:{name}" for name in ("noop", "waits", "inline")}
NOOP = work("noop", entry_point="bench_jobs:noop")


# Starts of each kind that are not counted.
WARM_UP = 10


class TimedServices(AnsweringWorker):
    """Records when the handler was called."""

    started_at = 0.0

    def started(self) -> None:
        self.started_at = time.perf_counter()


def spread(name: str, seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=20)
    return f"{name} p50 {cuts[9] * 1000:.1f} ms, p95 {cuts[18] * 1000:.1f} ms"


async def measure_starts(count: int, pause: float) -> None:
    """Runs in sequence: a fork, a handler that returns at once, and the end of its processes.

    Each kind in turn and by a zygote of its own, so that whatever else the machine does meanwhile strikes all
    alike.
    """
    rules = Planner([]).rules([], [])
    kinds = {
        "sandboxed": ChildPool(SystemClock(), sandbox=rules, share_after=0),
        "without sandbox": ChildPool(SystemClock(), share_after=0),
        "sandboxed, spare": ChildPool(SystemClock(), sandbox=rules, share_after=0, spares=2),
        "without sandbox, spare": ChildPool(SystemClock(), share_after=0, spares=2),
    }
    measured = {name: Starts() for name in kinds}
    for children in kinds.values():
        children.start()
        children.attach()
        await children.run(work("noop", entry_point="bench_jobs:noop"), TimedServices(), StopSignal())
    for number in range(count + WARM_UP):
        if number == WARM_UP:
            measured = {name: Starts() for name in kinds}
        # A later one finds warmer caches.
        for name, children in sorted(kinds.items(), reverse=bool(number % 2)):
            await measured[name].add(children, pause)
    for name, children in reversed(kinds.items()):  # the younger zygote first: it would be taken for adopted
        print(f"{count} runs in children, {name}: {measured[name]}")
        await children.close()
    for one, other in (
        ("sandboxed", "without sandbox"),
        ("sandboxed, spare", "without sandbox, spare"),
        ("sandboxed, spare", "sandboxed"),
    ):
        print(f"{one} / {other}: {measured[one].ratio_to(measured[other])}")
    print(load())


class Starts:
    """What starts of one kind cost."""

    def __init__(self) -> None:
        self.called: list[float] = []
        self.over: list[float] = []
        self.used: list[float] = []
        self.faults: list[int] = []

    async def add(self, children: ChildPool, pause: float, given: Work = NOOP) -> None:
        """One run, and a pause in which a spare is forked for it."""
        before, faulted, link = cpu(children), faults(children), TimedServices()
        began = time.perf_counter()
        await children.run(given, link, StopSignal())
        self.over.append(time.perf_counter() - began)
        self.called.append(link.started_at - began)
        await asyncio.sleep(pause)
        self.used.append(cpu(children) - before)
        self.faults.append(faults(children) - faulted)

    def __str__(self) -> str:
        return (
            f"{spread('called', self.called)}; {spread('over', self.over)}; CPU of worker, zygote and run "
            f"{statistics.mean(self.used) * 1000:.2f} ms a run; {statistics.mean(self.faults):.0f} faults"
        )

    def ratios_to(self, other: Starts) -> dict[str, float]:
        # Each pair ran within a few milliseconds, so the median excludes slow moments of the machine.
        return {
            name: statistics.median(
                a / b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)
            )
            for name in ("called", "over")
        }

    def ratio_to(self, other: Starts) -> str:
        pairs = self.ratios_to(other)
        used = statistics.mean(self.used) / statistics.mean(other.used)
        return f"called {pairs['called']:.3f}, over {pairs['over']:.3f} (median of pairs), CPU {used:.3f}"


async def measure_memory(children: ChildPool, count: int) -> None:
    """Run concurrent handlers that only wait."""
    # Once it has imported everything.
    await children.run(work("noop", entry_point="bench_jobs:noop"), TimedServices(), StopSignal())
    zygote = psutil.Process(children.zygote_pid)
    alone = zygote.memory_full_info().pss
    stops = [StopSignal() for _ in range(count)]
    given = work("waits", entry_point="bench_jobs:waits")
    links = [TimedServices() for _ in stops]
    runs = [
        asyncio.create_task(children.run(given, link, stop)) for link, stop in zip(links, stops, strict=True)
    ]
    await until(lambda: all(link.started_at for link in links), within=120)
    processes = zygote.children()
    each = [process.memory_full_info() for process in processes]
    together = sum(info.pss for info in each) + zygote.memory_full_info().pss
    print(
        f"{len(processes)} children at once: {(together - alone) / count / 2**20:.2f} MiB each (PSS), "
        f"{statistics.mean(info.uss for info in each) / 2**20:.2f} MiB of it theirs alone; "
        f"zygote alone {alone / 2**20:.1f} MiB"
    )
    for stop in stops:
        stop.request("cancel", 0)
    await asyncio.gather(*runs)


async def measure_children(what: Sequence[str], starts: int, count: int, pause: float) -> None:
    if "starts" in what:
        await measure_starts(starts, pause)
    if "memory" in what:
        children = ChildPool(SystemClock(), sandbox=Planner([]).rules([], []), share_after=0)
        children.start()
        children.attach()
        await measure_memory(children, count)
        await children.close()


def measure_inline(dialect: str, count: int, *, seconds: float) -> None:
    """Measure an idle worker, then one with sleeping runs."""
    with installation(dialect, orgs=100) as made:
        made.configure(slots=count, extra='renew = "1s"\ndrain = "1s"')
        make_plugin(
            made.folder / "plugins",
            dist="orgworker-bench",
            modules={"bench_jobs": HANDLERS},
            entry_points=ENTRY_POINTS,
        )
        made.define("bench.inline", spec={"overlap": "allow"})
        with made.workers() as working:
            process = psutil.Process(working.processes[0].pid)
            time.sleep(5)
            before, idle = process.memory_full_info().uss, used(process, seconds)
            made.add_backlog(count, "bench.inline", "inline")
            while running(made) < count:
                time.sleep(0.5)
            time.sleep(3)
            held, busy = process.memory_full_info().uss, used(process, seconds)
    print(
        f"{dialect}: {count} sleeping inline runs: {(held - before) / count / 1024:.1f} KiB each; worker CPU "
        f"{busy * 100:.1f} % of a processor with them, {idle * 100:.1f} % without; so a renewal of {count} "
        f"takes about {(busy - idle) * 1000:.0f} ms; {load()}"
    )


def running(made: Installation) -> int:
    with made.database.autocommit() as connection:
        return int(
            connection.execute(text("SELECT count(*) FROM live_runs WHERE state = 'running'")).scalar_one()
        )


def used(process: psutil.Process, seconds: float) -> float:
    """The share of a processor that a process uses, over `seconds`."""
    began = process.cpu_times()
    time.sleep(seconds)
    ended = process.cpu_times()
    return float((ended.user + ended.system - began.user - began.system) / seconds)


def cpu(children: ChildPool) -> float:
    """Processor seconds of this process, the zygote and all ended runs."""
    zygote = psutil.Process(children.zygote_pid).cpu_times()
    return time.process_time() + sum(zygote[:4])


def faults(children: ChildPool) -> int:
    """Page faults of the zygote and of all ended runs that the kernel served from memory."""
    fields = Path(f"/proc/{children.zygote_pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]) + int(fields[8])


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}, {datetime.now():%Y-%m-%d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["starts", "memory", "inline"])
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--starts", type=int, default=300)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--children", type=int, default=200)
    parser.add_argument("--inline", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    if {"starts", "memory"} & set(given.what):
        with tempfile.TemporaryDirectory(prefix="orgworker-bench-") as folder:
            make_plugin(Path(folder), modules={"bench_jobs": HANDLERS}, entry_points=ENTRY_POINTS)
            sys.path.append(folder)
            asyncio.run(measure_children(given.what, given.starts, given.children, given.pause))
    if "inline" in given.what:
        measure_inline(given.database, given.inline, seconds=given.seconds)


if __name__ == "__main__":
    main()
