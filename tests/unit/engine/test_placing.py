"""The placing loop: what it offers to the engine, and when it takes a run back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from tests.unit.engine.runs import admitted
from worker.errors import StoreUnavailable
from worker.features.hosts.temporal import EngineUnavailable, Standing
from worker.features.hosts.temporal.placing import Placing
from worker.ids import RunId
from worker.model.runs.hosts import Fence, Placed, Placement, PoolRoom, Ticket
from worker.model.runs.run import AdmittedRun, OwnedRun
from worker.telemetry import events

POOL = "eu-gpu"
ROOM = PoolRoom({"child": 10, "inline": 0}, {"acme.note": None})


class Engine:
    """A placer that remembers; `down` is what it answers instead."""

    def __init__(self) -> None:
        self.offered: dict[Fence, str] = {}
        self.withdrawn: list[Fence] = []
        self.gone: set[Fence] = set()
        self.down: str | None = None
        self.requests = 0

    async def place(self, placement: Placement, ticket: Ticket) -> None:
        self._answer()
        self.offered[placement.fence] = ticket.reveal()

    async def withdraw(self, placement: Placement) -> None:
        self._answer()
        self.withdrawn.append(placement.fence)

    async def describe(self, placement: Placement) -> Standing:
        self._answer()
        return "gone" if placement.fence in self.gone else "queued"

    async def check(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.requests += 1
        if self.down is not None:
            raise EngineUnavailable(self.down)


class Store:
    """The runs of a pool, and what became of them."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.waiting: list[AdmittedRun] = []
        self.room_of_hosts = ROOM
        self.tickets: dict[Fence, str] = {}
        self.placed_at: dict[Fence, float] = {}
        self.cancelled: set[Fence] = set()
        self.taken: set[Fence] = set()
        self.withdrawals: list[tuple[RunId, str]] = []
        self.marks: list[str | None] = []
        self.lost_answer = False

    async def room(self) -> PoolRoom:
        return self.room_of_hosts

    async def admit(self, room: PoolRoom) -> Sequence[AdmittedRun]:
        runs, self.waiting = self.waiting, []
        return runs

    async def place(self, tickets: Mapping[Fence, str]) -> set[Fence]:
        if self.lost_answer:
            raise StoreUnavailable("no answer")
        self.tickets |= tickets
        self.placed_at |= dict.fromkeys(tickets, self.clock.monotonic())
        return set(tickets)

    async def withdraw(self, fences: Collection[Fence], detail: str, after: timedelta) -> set[Fence]:
        ours = {fence for fence in fences if fence in self.placed_at}
        for fence in sorted(ours):
            del self.placed_at[fence]
            self.withdrawals.append((fence[0], detail))
        return ours

    async def placed(self) -> Sequence[Placed]:
        return [
            Placed(
                Placement(*fence, POOL, "child"),
                timedelta(seconds=self.clock.monotonic() - at),
                fence in self.cancelled,
            )
            for fence, at in self.placed_at.items()
        ]

    async def mark(self, detail: str | None) -> int:
        self.marks.append(detail)
        return 0

    def take(self, fence: Fence) -> None:
        del self.placed_at[fence]


class Bench:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.engine = Engine()
        self.store = Store(clock)
        self.loop = Placing(
            self.store, self.engine, POOL, clock, poll=60.0, place_timeout=timedelta(seconds=30)
        )
        self.emitted: list[tuple[str, Mapping[str, Any]]] = []

    def wait(self, *names: str, fencing_token: int = 1) -> None:
        self.store.waiting += [
            replace(admitted(id=RunId(name), fencing_token=fencing_token), pool=POOL) for name in names
        ]

    def holds(self, name: str, fencing_token: int = 1) -> bool:
        return self.loop.holds(OwnedRun(RunId(name), fencing_token, None))

    def names(self) -> list[str]:
        return [name for name, _ in self.emitted]


@pytest.fixture
def bench(clock: ManualClock) -> Iterator[Bench]:
    made = Bench(clock)
    end = events.listen(lambda emitted: made.emitted.append((emitted.event.name, emitted.fields)))
    yield made
    end()


def fence(name: str, fencing_token: int = 1) -> Fence:
    return RunId(name), fencing_token


async def test_a_waiting_run_is_offered_with_the_ticket_whose_hash_is_stored(bench: Bench) -> None:
    bench.wait("a", "b")

    assert await bench.loop.turn() == 2

    assert set(bench.engine.offered) == {fence("a"), fence("b")}
    for each, text in bench.engine.offered.items():
        assert hashlib.sha256(text.encode()).hexdigest() == bench.store.tickets[each]
    assert bench.holds("a")
    assert not bench.holds("a", 2)
    assert bench.emitted == [("runs.placed", {"pool": POOL, "count": 2})]


async def test_a_run_that_a_host_took_is_not_held_any_more(bench: Bench) -> None:
    bench.wait("a")
    await bench.loop.turn()
    bench.store.take(fence("a"))
    bench.clock.advance(0.2)

    await bench.loop.turn()

    assert not bench.holds("a")
    assert (bench.store.withdrawals, bench.engine.withdrawn) == ([], [])


async def test_a_run_that_no_host_takes_waits_again(bench: Bench) -> None:
    bench.wait("a")
    await bench.loop.turn()
    bench.clock.advance(29.8)
    await bench.loop.turn()
    assert bench.holds("a")

    bench.clock.advance(0.2)
    await bench.loop.turn()

    assert bench.store.withdrawals == [("a", "no host took it within 30 s")]
    assert bench.engine.withdrawn == [fence("a")]
    assert not bench.holds("a")
    assert bench.emitted[-1] == (
        "runs.unplaced",
        {"pool": POOL, "count": 1, "detail": "no host took it within 30 s"},
    )


async def test_a_run_whose_activity_is_gone_waits_again_at_once(bench: Bench) -> None:
    bench.wait("a", "b")
    await bench.loop.turn()
    bench.engine.gone.add(fence("a"))
    bench.clock.advance(2.0)

    await bench.loop.turn()

    assert [run_id for run_id, _ in bench.store.withdrawals] == ["a"]
    assert bench.holds("b")


async def test_a_cancelled_run_is_withdrawn_first_in_the_database(bench: Bench) -> None:
    bench.wait("a", "b")
    await bench.loop.turn()
    bench.store.cancelled.add(fence("a"))
    bench.clock.advance(0.2)

    await bench.loop.turn()

    assert bench.store.withdrawals == [("a", "its cancellation was requested")]
    assert bench.engine.withdrawn == [fence("a")]


async def test_a_run_that_is_taken_at_the_last_moment_is_not_withdrawn_in_the_engine(bench: Bench) -> None:
    bench.wait("a")
    await bench.loop.turn()
    bench.clock.advance(30.0)
    withdraw = bench.store.withdraw

    async def take_first(fences: Collection[Fence], detail: str, after: timedelta) -> set[Fence]:
        bench.store.take(fence("a"))
        return await withdraw(fences, detail, after)

    bench.store.withdraw = take_first  # type: ignore[method-assign]
    await bench.loop.turn()

    assert bench.engine.withdrawn == []
    assert not bench.holds("a")


async def test_without_room_nothing_is_admitted(bench: Bench) -> None:
    bench.wait("a")
    for room in (PoolRoom({}, {}), PoolRoom({"child": 0, "inline": 0}, {"acme.note": None})):
        bench.store.room_of_hosts = room

        assert await bench.loop.turn() == 0

    assert len(bench.store.waiting) == 1


async def test_an_engine_that_is_away_leaves_every_run_waiting_and_is_tried_again(bench: Bench) -> None:
    bench.wait(*(f"r{number}" for number in range(100)))
    bench.engine.down = "Temporal at 127.0.0.1:7233 does not respond"

    assert await bench.loop.turn() == 0

    assert len(bench.store.withdrawals) == 100
    assert {detail for _, detail in bench.store.withdrawals} == {bench.engine.down}
    # The others were not even tried, and nothing is withdrawn where nobody answers.
    assert bench.engine.requests <= 32
    assert bench.engine.withdrawn == []
    bench.wait("late")
    requests = bench.engine.requests
    await bench.loop.turn()
    assert bench.engine.requests == requests
    bench.clock.advance(1.0)
    await bench.loop.turn()
    assert bench.engine.requests == requests + 1
    assert bench.store.marks == [bench.engine.down]
    bench.engine.down = None
    bench.clock.advance(1.9)
    assert await bench.loop.turn() == 0
    bench.clock.advance(0.1)

    assert await bench.loop.turn() == 1

    assert bench.store.marks[1:] == [None]
    assert [name for name in bench.names() if name.startswith("engine")] == ["engine.lost", "engine.back"]


async def test_runs_whose_tickets_may_not_be_stored_are_left_to_the_reconciler(bench: Bench) -> None:
    bench.wait("a")
    bench.store.lost_answer = True

    with pytest.raises(StoreUnavailable):
        await bench.loop.turn()

    assert not bench.holds("a")
    assert bench.engine.offered == {}


async def test_what_no_host_has_taken_waits_again_when_the_worker_stops(bench: Bench) -> None:
    bench.wait("a", "b")
    running = asyncio.create_task(bench.loop.run())
    for _ in range(20):  # turns of the event loop
        await asyncio.sleep(0)
    bench.store.take(fence("b"))

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert bench.store.withdrawals == [("a", "the worker that placed it stopped")]
    assert bench.engine.withdrawn == [fence("a")]


async def test_a_stop_between_admission_and_tickets_leaves_no_run_behind(bench: Bench) -> None:
    bench.wait("a")
    admit, asked, answer = bench.store.admit, asyncio.Event(), asyncio.Event()

    async def slow(room: PoolRoom) -> Sequence[AdmittedRun]:
        asked.set()
        await answer.wait()
        return await admit(room)

    bench.store.admit = slow  # type: ignore[method-assign]
    running = asyncio.create_task(bench.loop.run())
    await asked.wait()
    running.cancel()
    await asyncio.sleep(0)
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert [run_id for run_id, _ in bench.store.withdrawals] == ["a"]
