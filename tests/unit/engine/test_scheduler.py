"""The scheduler fires, sleeps until what is next, and says when the clock went back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta

from tests.fakes.clock import START, ManualClock, settle
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops.scheduler import BATCH, LARGER, PAUSE, PUT_OFF, Scheduler, Wakeups
from worker.errors import StoreUnavailable
from worker.ids import DefinitionId, OrgId
from worker.model.runs.run import Decision, DueDefinition, FireReport
from worker.telemetry.events import Emitted


def due(spec: dict[str, object]) -> DueDefinition:
    return DueDefinition(DefinitionId("d1"), OrgId("o1"), "org_acme", None, "nightly", 1, START, spec)


class Store:
    """Answers each call of fire with the next report, and decides what it is told to."""

    def __init__(self, *reports: FireReport | Exception) -> None:
        self.reports = list(reports)
        self.limits: list[int] = []
        self.due: list[DueDefinition] = []
        self.decisions: list[Decision] = []

    @property
    def calls(self) -> int:
        return len(self.limits)

    async def fire(self, decide: Callable[[DueDefinition, datetime], Decision], *, limit: int) -> FireReport:
        self.limits.append(limit)
        self.decisions += [decide(definition, START) for definition in self.due]
        answer = self.reports.pop(0) if self.reports else FireReport(now=START)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def fired(store: Store, clock: ManualClock, *, turns: int = 1) -> None:
    """Let the scheduler run until it sleeps; each further turn is a wake-up."""
    scheduler = Scheduler(store, HandlerRegistry(), clock, poll=60.0, on_fired=lambda: None)
    task = asyncio.create_task(scheduler.run())
    for _ in range(turns):
        await settle()
        scheduler.wake.set()
    await settle()
    task.cancel()


async def test_a_full_batch_is_followed_by_the_next_at_once(clock: ManualClock) -> None:
    store = Store(FireReport(now=START, more=True), FireReport(now=START, more=True))

    await fired(store, clock, turns=0)

    assert store.calls == 3


async def test_batches_are_larger_while_more_are_due(clock: ManualClock) -> None:
    """The first one is small, so that the first run starts at once."""
    store = Store(FireReport(now=START, more=True), FireReport(now=START, more=True))

    await fired(store, clock)

    assert store.limits == [BATCH, LARGER, LARGER, BATCH]


async def test_what_other_workers_are_firing_is_not_asked_for_all_the_time(clock: ManualClock) -> None:
    """Its rows are locked, so it is due and cannot be had."""
    store = Store(*(FireReport(now=START, next_fire_at=START) for _ in range(50)))

    await fired(store, clock, turns=0)

    assert store.calls == 1


async def test_an_absent_database_is_asked_again_at_the_next_poll(clock: ManualClock) -> None:
    store = Store(StoreUnavailable("away"))

    await fired(store, clock)

    assert store.calls == 2


async def test_a_definition_that_cannot_be_read_is_put_off_and_the_others_fire(
    clock: ManualClock, emitted: list[Emitted]
) -> None:
    store = Store()
    store.due = [
        due({"handler": "acme.digest", "schedule": "nonsense"}),
        due({"handler": "acme.digest", "schedule": "@hourly", "spread": "off"}),
    ]

    await fired(store, clock, turns=0)

    bad, good = store.decisions
    assert bad.runs == ()
    assert bad.next.next_scheduled_for == START
    assert bad.next.next_fire_at == START + PUT_OFF
    assert [run.scheduled_for for run in good.runs] == [START]
    assert [event.event.name for event in emitted] == ["definition.failed"]


async def test_a_clock_that_went_back_is_told(clock: ManualClock, emitted: list[Emitted]) -> None:
    earlier = START - timedelta(hours=1)
    store = Store(FireReport(now=START), FireReport(now=earlier), FireReport(now=earlier))

    await fired(store, clock, turns=3)

    told = [event.fields["seconds"] for event in emitted if event.event.name == "clock.went_back"]
    assert told[0] == 3600.0


async def test_what_is_said_during_a_pause_is_sent_as_one_hint(clock):
    sent = 0

    async def send() -> None:
        nonlocal sent
        sent += 1
        if sent == 1:
            raise StoreUnavailable("away")

    hints = Wakeups(send, clock)
    task = asyncio.create_task(hints.run())
    for _ in range(3):
        for _ in range(10):
            hints.request()
            await asyncio.sleep(0)
        clock.advance(PAUSE)
        await asyncio.sleep(0)

    assert sent == 1 + 3, "one at once, and one after each pause"
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
