"""The loop of starts: batches while there are some, a share of its time for others, then a look a poll."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from tests.fakes.clock import ManualClock, settle
from worker.engine.loops.starts import PUT_OFF, Starts
from worker.errors import StoreUnavailable
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.runs.run import MadeRuns, Swept
from worker.telemetry.events import Emitted

BAD = DefinitionId("bad")
POLL = 10.0


class Store:
    """Answers each step with the next report; each step takes a second."""

    def __init__(self, clock: ManualClock, *reports: MadeRuns | Exception) -> None:
        self._clock = clock
        self._reports = list(reports)
        self.steps: list[tuple[DefinitionId | None, set[DefinitionId]]] = []

    async def make(self, after: DefinitionId | None, without: Collection[DefinitionId]) -> MadeRuns:
        self.steps.append((after, set(without)))
        answer = self._reports.pop(0) if self._reports else MadeRuns()
        if isinstance(answer, Exception):
            raise answer
        if answer.made:
            self._clock.advance(1.0)
        return answer


async def made(store: Store, clock: ManualClock, *seconds: float, on_made: Callable[[], None] = int) -> None:
    """Let the loop run, then let so much time pass, and so much again."""
    loop = Starts(store.make, clock, poll=POLL, on_made=on_made)
    task = asyncio.create_task(loop.run())
    await settle()
    for each in seconds:
        clock.advance(each)
        await settle()
    task.cancel()


async def test_a_backlog_leaves_time_for_others(clock: ManualClock) -> None:
    store = Store(clock, MadeRuns(runs=500), MadeRuns(runs=500))

    await made(store, clock, 0.5)
    assert len(store.steps) == 1
    store = Store(clock, MadeRuns(runs=500), MadeRuns(runs=500))
    await made(store, clock, 0.7)
    assert len(store.steps) == 2


async def test_without_starts_it_looks_once_a_poll(clock: ManualClock) -> None:
    store = Store(clock)

    await made(store, clock, POLL - 1, 2, POLL)

    assert len(store.steps) == 3


async def test_the_walk_goes_on_after_the_last_definition(clock: ManualClock) -> None:
    store = Store(clock, MadeRuns(passed=DefinitionId("m")), MadeRuns())

    await made(store, clock)

    assert [after for after, _ in store.steps] == [None, "m"]


async def test_runs_are_admitted_at_once_and_refused_ones_are_reported(
    clock: ManualClock, emitted: list[Emitted]
) -> None:
    refused = Swept(RunId("r"), OrgId("o"), DefinitionId("d"), "acme", "sync", 0, "refused", "overlap")
    called: list[int] = []
    store = Store(clock, MadeRuns(runs=2, refused=[refused]))

    await made(store, clock, on_made=lambda: called.append(1))

    assert called == [1]
    assert [event.event.name for event in emitted] == ["run.changed", "starts.made"]
    assert emitted[-1].fields == {"count": 2, "refused": 1}


async def test_an_unreadable_definition_is_put_off(clock: ManualClock, emitted: list[Emitted]) -> None:
    store = Store(clock, MadeRuns(runs=1, unreadable={BAD: ("acme", "sync", "no such key")}))

    await made(store, clock, 1.0, POLL, PUT_OFF)

    assert [without for _, without in store.steps] == [set(), {BAD}, {BAD}, set()]
    assert [event.event.name for event in emitted] == ["definition.failed", "starts.made"]


async def test_an_outage_is_waited_out(clock: ManualClock) -> None:
    store = Store(clock, StoreUnavailable("gone"), MadeRuns(runs=1))

    await made(store, clock, POLL)

    assert len(store.steps) == 2
