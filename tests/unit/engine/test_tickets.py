"""A host's activities: each lasts as long as the attempt of its ticket, whatever Temporal does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.testing import ActivityEnvironment

from tests.fakes.clock import ManualClock, settle
from tests.unit.engine.runs import admitted
from worker.engine.attempt.inflight import InflightRuns
from worker.errors import StoreUnavailable
from worker.features.hosts.temporal.tickets import TicketTaking
from worker.features.hosts.wire import Taken, TemporalPlace


class Bench:
    """A host without Temporal: tests call its activity."""

    def __init__(self, clock: ManualClock) -> None:
        self.offers = True
        self.inflight_runs = InflightRuns()
        self.answers: dict[str, Any] = {}
        self.answered = asyncio.Event()
        self.answered.set()
        self.started: list[str] = []
        self.environment = ActivityEnvironment()
        self.heartbeats = 0
        self.environment.on_heartbeat = self._heard
        self.taking = TicketTaking(
            self,
            self.inflight_runs,
            clock,
            "gpu",
            TemporalPlace("127.0.0.1:1", "default"),
            None,
            "a host",
            slots={"child": 1, "inline": 0},
            poll=0.01,
            offers=lambda: self.offers,
            start=self._start,
            on_taking=lambda: None,
        )
        self.taking._poll = self._poll  # type: ignore[method-assign]

    async def take_by(self, ticket: str) -> Sequence[Taken]:
        await self.answered.wait()
        answer = self.answers.get(ticket, [])
        if isinstance(answer, Exception):
            raise answer
        return cast(Sequence[Taken], answer)

    def offer(self, ticket: str) -> None:
        self.answers[ticket] = [SimpleNamespace(run=admitted(ticket), timeout=timedelta(hours=1))]

    def _start(self, attempts: Sequence[Taken]) -> None:
        for taken in attempts:
            self.started.append(taken.run.id)
            self.inflight_runs.add(taken.run)

    def _heard(self, *details: Any) -> None:
        assert details == ()
        self.heartbeats += 1

    async def _poll(self) -> None:
        """In place of Temporal's own."""
        await asyncio.Event().wait()

    def end(self, name: str) -> None:
        """The attempt has ended, and its end is written."""
        (inflight,) = [each for each in self.inflight_runs if each.run.id == name]
        self.inflight_runs.release(inflight)
        self.taking.wake.set()

    def activity(self, ticket: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.environment.run(self.taking._attempt, ticket))


async def settled(task: asyncio.Task[Any]) -> bool:
    """Whether it is done after a moment."""
    await settle()
    return task.done()


@pytest.fixture
def bench(clock: ManualClock) -> Bench:
    return Bench(clock)


async def test_a_host_that_can_run_nothing_takes_no_ticket(bench: Bench) -> None:
    """None of its requests could be sent, for instance: the run is placed again."""
    bench.offers = False
    bench.offer("a")

    activity = bench.activity("a")
    assert not await settled(activity)
    await asyncio.wait_for(activity, 5)
    assert bench.started == []


async def test_an_activity_lasts_as_long_as_its_attempt(bench: Bench) -> None:
    running = asyncio.create_task(bench.taking.run())
    bench.offer("a")
    activity = bench.activity("a")

    assert not await settled(activity)
    assert (bench.started, bench.heartbeats) == (["a"], 1)
    bench.end("a")

    assert await asyncio.wait_for(activity, 5) is None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("answer", [[], StoreUnavailable("no worker answers"), ValueError("not an attempt")])
async def test_a_ticket_for_which_there_is_no_run_ends_its_activity(bench: Bench, answer: Any) -> None:
    bench.answers["a"] = answer

    assert await asyncio.wait_for(bench.activity("a"), 5) is None

    assert bench.started == []


async def test_cancelling_an_activity_in_temporal_stops_no_attempt(bench: Bench) -> None:
    bench.offer("a")
    bench.answered.clear()
    activity = bench.activity("a")
    assert not await settled(activity)
    bench.environment.cancel()
    assert not await settled(activity)
    bench.answered.set()

    assert not await settled(activity)

    assert bench.started == ["a"]
    running = asyncio.create_task(bench.taking.run())
    bench.end("a")
    assert await asyncio.wait_for(activity, 5) is None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_host_that_stops_ends_its_activities_and_takes_nothing_more(bench: Bench) -> None:
    running = asyncio.create_task(bench.taking.run())
    bench.offer("a")
    first = bench.activity("a")
    assert not await settled(first)
    bench.answered.clear()
    slow = bench.activity("slow")
    assert not await settled(slow)

    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    for activity in (first, slow, bench.activity("b")):
        assert await asyncio.wait_for(activity, 5) is None
    assert bench.started == ["a"]
    # The attempt itself is drained by the dispatcher.
    assert len(list(bench.inflight_runs)) == 1
