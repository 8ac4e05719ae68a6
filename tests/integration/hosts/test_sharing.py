"""Hosts of a pool share its runs, whichever workers they ask, on both databases."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.conftest import on_either
from tests.fakes.running import until
from tests.integration.hosts.conftest import Fleet, Host, Worker, end_of
from worker.clock import SystemClock
from worker.features.hosts import wire
from worker.features.hosts.sharing import Sharing
from worker.model.runs.hosts import PoolLoad
from worker.store import hosts

# Slots of each host: `Host.register` says 10. Half the load of three.
SLOTS = 10
HALF = 15


class Taker:
    """A host that takes what it has slots for, as `Taking` does, and ends a run when it is told to."""

    def __init__(self, host: Host, worker: Worker) -> None:
        self.host = host
        self.worker = worker
        self.running: list[wire.Taken] = []
        self.got = 0

    async def run(self) -> None:
        while True:
            taken = await self.host.take(self.worker, SLOTS - len(self.running), wait=10.0)
            self.running += taken
            self.got += len(taken)

    async def end(self) -> None:
        ends = [end_of(taken) for taken in self.running]
        self.running.clear()
        await self.host.finish(self.worker, *ends)


@asynccontextmanager
async def taking(fleet: Fleet, *workers: Worker) -> AsyncIterator[list[Taker]]:
    """Hosts that ask these workers, one each; waits until all do."""
    patient(fleet)
    takers = [Taker(await fleet.host(f"h{place}"), worker) for place, worker in enumerate(workers)]
    tasks = [asyncio.create_task(taker.run()) for taker in takers]
    counts = Counter(id(worker) for worker in workers)

    def open_takes(worker: Worker) -> int:
        assert worker.api is not None
        return sum(len(runs.delivery._takes) for runs in worker.api._incarnations.values())

    await until(lambda: all(open_takes(worker) == counts[id(worker)] for worker in workers))
    try:
        yield takers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def start(fleet: Fleet, count: int) -> None:
    for number in range(count):
        fleet.start(org="org_a" if number % 2 else "org_b")  # each within its limit
    for worker in fleet.workers:
        assert worker.api is not None
        worker.api.wake()


def patient(fleet: Fleet) -> None:
    """Let no poll pass during a test, however slow the machine is."""
    for worker in fleet.workers:
        assert worker.api is not None
        shared = worker.api.shared
        worker.api.shared = replace(shared, sharing=Sharing(shared.store, SystemClock(), 60.0))


def got(takers: Sequence[Taker]) -> list[int]:
    return [taker.got for taker in takers]


def first_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule before: who comes first gets what it has slots for."""
    monkeypatch.setattr(Sharing, "_first", lambda self, line: line.asking[0])
    monkeypatch.setattr(Sharing, "_left", lambda self, line, load, worker: False)
    monkeypatch.setattr(PoolLoad, "part", lambda self, worker, free: dict(free))


@pytest.mark.parametrize("shared", [True, False], ids=["", "control"])
async def test_three_hosts_share_half_their_load(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        first_come(monkeypatch)
    async with taking(fleet, fleet.one, fleet.one, fleet.one) as takers:
        start(fleet, HALF)
        await until(lambda: sum(got(takers)) == HALF)
    if shared:
        assert min(got(takers)) > 0
        assert max(got(takers)) <= 1.5 * HALF / 3
    else:
        assert max(got(takers)) == SLOTS
        assert min(got(takers)) == 0


@pytest.mark.parametrize("shared", [True, False], ids=["", "control"])
async def test_runs_that_end_before_the_next_one_go_around(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        first_come(monkeypatch)
    async with taking(fleet, fleet.one, fleet.one, fleet.one) as takers:
        for number in range(1, 10):
            start(fleet, 1)
            await until(lambda number=number: sum(got(takers)) == number)
            for taker in takers:
                if taker.running:
                    await taker.end()
    if shared:
        assert min(got(takers)) > 0
        assert max(got(takers)) <= 1.5 * 9 / 3
    else:
        assert min(got(takers)) == 0


@on_either
@pytest.mark.parametrize("shared", [True, False], ids=["", "control"])
async def test_hosts_share_across_workers(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """The worker that looks first leaves the run to the emptier host, which asks the other one."""
    if not shared:
        monkeypatch.setattr(Sharing, "_left", lambda self, line, load, worker: False)
    patient(fleet)
    busy, idle = await fleet.host("h1"), await fleet.host("h2")
    fleet.start()
    assert len(await busy.take(fleet.one, SLOTS)) == 1
    fleet.start()

    first = await busy.take(fleet.one, SLOTS - 1, wait=0.2)
    then = await idle.take(fleet.two, SLOTS, wait=0.2)
    assert (len(first), len(then)) == ((0, 1) if shared else (1, 0))


@on_either
async def test_the_load_of_a_pool_is_that_of_its_live_hosts(fleet: Fleet) -> None:
    host, other = await fleet.host("h1"), await fleet.host("h2")
    await fleet.host("elsewhere", pool="eu")
    gone = await fleet.host("h3")
    await gone.call(fleet.one, "unregister")

    def load(pool: str) -> PoolLoad | None:
        with fleet.database.autocommit() as connection:
            return hosts.load(connection, pool)

    assert load("default") is None
    for _ in range(3):
        fleet.start()
    assert len(await host.take(fleet.one, 1)) == 1
    found = load("default")
    assert found is not None
    assert found.due == {"child": 2}
    assert 0 <= found.waited < 60
    assert found.shares == {host.id: (0.9, 1.0), other.id: (1.0, 1.0)}
    assert load("eu") is None
