"""Free slots are filled in batches worth a transaction, and what begins keeps nothing that ends waiting."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.clock import START, ManualClock, settle
from tests.unit.engine.runs import admission, admitted, ended
from worker.engine.attempt import inflight as inflight_module
from worker.engine.attempt.inflight import InflightRun, InflightRuns
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.loops.admission import FEW, MOMENT
from worker.engine.loops.dispatcher import BURST, PREPARED, Dispatcher
from worker.engine.loops.finisher import WORTHWHILE
from worker.errors import StoreUnavailable
from worker.ids import ALL_ORGS, RunId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, Isolation, OwnedRun
from worker.secret import AccessToken
from worker.telemetry import events
from worker.telemetry.masking import MASK, Masker


class Backlog:
    """Gives so many of the waiting runs as are asked for; keeps what was asked."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self.asked: list[int] = []
        self.batches: list[int] = []
        self.prepared: list[int] = []
        self.fault: Exception | None = None

    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        self.asked.append(free["inline"])
        given = min(self.waiting, free["inline"])
        self.waiting -= given
        return [admitted(f"r{self.waiting + n}", isolation="inline") for n in range(given)]

    async def finish(self, attempts: Sequence[EndedAttempt]) -> set[RunId]:
        self.batches.append(len(attempts))
        await asyncio.sleep(0)
        return {attempt.run_id for attempt in attempts}


async def test_a_few_free_slots_wait_a_moment_for_more_while_a_backlog_waits(clock: ManualClock) -> None:
    store, inflight_runs = Backlog(10_000), InflightRuns()
    admitting = admission(store, inflight_runs, clock, slots={"inline": FEW}, poll=1.0)
    task = asyncio.create_task(admitting.run())
    await settle()

    inflight = list(inflight_runs)
    inflight_runs.release(inflight[0])
    admitting.wake.set()
    await settle()
    assert store.asked == [FEW]

    inflight_runs.release(inflight[1])
    await clock.pass_time(MOMENT)
    task.cancel()
    assert store.asked == [FEW, 2]


async def test_one_of_few_slots_is_filled_at_once(clock: ManualClock) -> None:
    """A worker with eight processes must not leave one idle."""
    store, inflight_runs = Backlog(10_000), InflightRuns()
    admitting = admission(store, inflight_runs, clock, slots={"inline": 8}, poll=1.0)
    task = asyncio.create_task(admitting.run())
    await settle()

    inflight_runs.release(next(iter(inflight_runs)))
    admitting.wake.set()
    await settle()
    task.cancel()

    assert store.asked == [8, 1]


async def test_one_free_slot_is_filled_at_once_where_nothing_else_waits(clock: ManualClock) -> None:
    store, inflight_runs = Backlog(FEW - 1), InflightRuns()
    admitting = admission(store, inflight_runs, clock, slots={"inline": FEW}, poll=1.0)
    task = asyncio.create_task(admitting.run())
    await settle()

    store.waiting = 1
    admitting.wake.set()
    await settle()
    task.cancel()

    assert store.waiting == 0


async def at_once(inflight: InflightRun, tools: Any) -> EndedAttempt:
    """Every attempt succeeds in its first step."""
    if inflight.stop.asked:
        return ended(inflight.run.id, state="waiting", outcome="handed_back")
    return ended(inflight.run.id)


Attempt = Callable[[InflightRun, Any], Awaitable[EndedAttempt]]


def dispatcher_of(
    store: Backlog,
    inflight_runs: InflightRuns,
    clock: ManualClock,
    ends: list[EndedAttempt],
    attempt: Attempt = at_once,
) -> Dispatcher[Any]:
    async def prepare(runs: Sequence[AdmittedRun]) -> None:
        store.prepared.append(len(runs))
        if store.fault is not None:
            raise store.fault

    run_log = RunLogWriter(cast(Any, store), clock)
    tools: Any = SimpleNamespace(clock=clock, run_log=run_log, prepare=prepare)
    return Dispatcher(
        tools,
        attempt,
        inflight_runs,
        store,
        on_free=lambda: None,
        on_end=lambda attempt, inflight: ends.append(attempt),
    )


async def test_ends_are_written_while_the_rest_of_a_large_answer_begins(clock: ManualClock) -> None:
    store, inflight_runs, ends = Backlog(0), InflightRuns(), []
    dispatcher = dispatcher_of(store, inflight_runs, clock, ends)
    writing = asyncio.create_task(dispatcher.finisher.run())
    await settle()

    dispatcher.start([admitted(f"r{n}") for n in range(2 * WORTHWHILE)])
    assert len(list(inflight_runs)) == 2 * WORTHWHILE  # every one is inflight before the first begins
    await settle(50)
    writing.cancel()

    assert [attempt.run_id for attempt in ends] == [f"r{n}" for n in range(2 * WORTHWHILE)]
    assert len(store.batches) > 1
    assert dispatcher.running == 0


async def test_a_run_whose_admission_is_answered_after_it_was_handed_back_is_not_started(
    clock: ManualClock,
) -> None:
    """The answer was under way for two renewals; the run may have its next attempt already, even here."""
    inflight_runs = InflightRuns()
    dispatcher = dispatcher_of(Backlog(0), inflight_runs, clock, [])
    inflight_runs.hand_back([OwnedRun(RunId("r1"), 1, None)])

    dispatcher.start(
        [admitted("r1", fencing_token=1), admitted("r2", fencing_token=1), admitted("r3", fencing_token=2)]
    )
    dispatcher.start([admitted("r3", fencing_token=1)])

    assert [(held.run.id, held.run.fencing_token) for held in inflight_runs] == [("r2", 1), ("r3", 2)]


async def test_a_later_attempt_kills_the_one_that_it_replaces(clock: ManualClock) -> None:
    inflight_runs = InflightRuns()
    first = inflight_runs.add(admitted("r1", fencing_token=1))

    second = inflight_runs.add(admitted("r1", fencing_token=2))

    assert (first.stop.killed, second.stop.killed) == (True, False)
    assert inflight_runs.used(first.run.isolation) == 1


async def test_a_tenth_that_became_due_later_starts_before_what_still_queues(clock: ManualClock) -> None:
    store, ends = Backlog(0), []
    dispatcher = dispatcher_of(store, InflightRuns(), clock, ends)
    writing = asyncio.create_task(dispatcher.finisher.run())
    later = START + timedelta(seconds=1)

    dispatcher.start([admitted(f"r{n}") for n in range(4 * BURST)])
    if sys.version_info < (3, 12):
        await asyncio.sleep(0)  # tasks begin in the next turn only
    dispatcher.start([admitted(f"s{n}", available_at=later if n < 12 else START) for n in range(50)])
    await settle(50)
    writing.cancel()

    order = [attempt.run_id for attempt in ends]
    assert len(order) == 4 * BURST + 50
    # Of the twelve no more than a tenth of the batch, and one, goes first.
    assert sorted(order.index(RunId(f"s{n}")) < 2 * BURST for n in range(12)) == [False] * 6 + [True] * 6
    assert [each for each in order if each.startswith("r")] == [f"r{n}" for n in range(4 * BURST)]


async def test_a_drain_hands_back_what_was_admitted_and_has_not_begun(clock: ManualClock) -> None:
    store, inflight_runs, ends = Backlog(0), InflightRuns(), []
    dispatcher = dispatcher_of(store, inflight_runs, clock, ends)
    writing = asyncio.create_task(dispatcher.finisher.run())

    dispatcher.start([admitted(f"r{n}") for n in range(2 * BURST)])
    assert dispatcher.running > 0
    await dispatcher.drain(timedelta(seconds=10))
    writing.cancel()

    assert len(ends) == 2 * BURST
    assert {attempt.state for attempt in ends[-BURST:]} == {"waiting"}
    assert dispatcher.running == 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (None, []),
        (StoreUnavailable("the database is away"), []),
        (RuntimeError("unexpected"), 2 * ["loop.failed"]),
    ],
)
async def test_what_many_attempts_need_is_read_together(
    clock: ManualClock, emitted: list[events.Emitted], fault: Exception | None, told: list[str]
) -> None:
    """A failure of that is left to each attempt; an outage is told by the first that meets it, not here."""
    store, ends = Backlog(0), []
    store.fault = fault
    dispatcher = dispatcher_of(store, InflightRuns(), clock, ends)
    writing = asyncio.create_task(dispatcher.finisher.run())

    dispatcher.start([admitted(f"r{n}") for n in range(PREPARED + 3)])
    await settle(200)
    writing.cancel()

    assert store.prepared == [PREPARED, 3]
    assert len(ends) == PREPARED + 3
    assert [one.event.name for one in emitted if one.event.name == "loop.failed"] == told


async def test_runs_admitted_meanwhile_start_once_what_they_need_is_read(clock: ManualClock) -> None:
    """They are read together, while those that were admitted before start."""
    known: set[str] = set()
    unknown: list[str] = []

    async def prepare(runs: Sequence[AdmittedRun]) -> None:
        await asyncio.sleep(0)
        known.update(run.id for run in runs)

    async def attempt(inflight: InflightRun, tools: Any) -> EndedAttempt:
        if inflight.run.id not in known:
            unknown.append(inflight.run.id)
        return ended(inflight.run.id)

    store, ends = Backlog(0), []
    dispatcher = dispatcher_of(store, InflightRuns(), clock, ends, attempt)
    dispatcher.tools.prepare = prepare
    writing = asyncio.create_task(dispatcher.finisher.run())
    later = START + timedelta(seconds=1)
    for number in range(4):
        names = [f"{number}-{n}" for n in range(3 * BURST)]
        dispatcher.start([admitted(name, available_at=later if number else START) for name in names])
        await asyncio.sleep(0)
    assert dispatcher.running > 0
    await settle(200)
    writing.cancel()

    assert len(ends) == 12 * BURST
    assert unknown == []
    assert dispatcher.running == 0


async def test_the_tokens_of_each_run_in_flight_are_masked(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the masker remembers otherwise."""
    known = Masker(limit=2, kept=2)
    monkeypatch.setattr(inflight_module, "masker", known)
    texts = [secrets.token_hex(30) for _ in range(30)]
    go_on = asyncio.Event()

    async def attempt(inflight: InflightRun, tools: Any) -> EndedAttempt:
        for _ in range(2):
            inflight.hold(AccessToken(texts[int(inflight.run.id[1:])], START))
        await go_on.wait()
        return ended(inflight.run.id)

    store, ends = Backlog(0), []
    dispatcher = dispatcher_of(store, InflightRuns(), clock, ends, attempt)
    writing = asyncio.create_task(dispatcher.finisher.run())
    dispatcher.start([admitted(f"r{n}") for n in range(30)])
    await settle(20)

    assert known.mask(" ".join(texts), ALL_ORGS) == " ".join([MASK] * 30)
    go_on.set()
    await settle(50)
    writing.cancel()
    assert len(ends) == 30
    assert known.mask(" ".join(texts), ALL_ORGS) == " ".join([*texts[:28], MASK, MASK])


async def test_a_drain_waits_for_runs_that_were_prepared_after_it_began(clock: ManualClock) -> None:
    """Runs that end at once may be before others, which the drain must not leave running."""
    store, inflight_runs, ends = Backlog(0), InflightRuns(), []
    reads, read = asyncio.Event(), asyncio.Event()

    async def attempt(inflight: InflightRun, tools: Any) -> EndedAttempt:
        if inflight.run.id == "child":
            await read.wait()
        return await at_once(inflight, tools)

    dispatcher = dispatcher_of(store, inflight_runs, clock, ends, attempt)

    async def prepare(runs: Sequence[AdmittedRun]) -> None:
        await reads.wait()

    dispatcher.tools.prepare = prepare
    writing = asyncio.create_task(dispatcher.finisher.run())
    names = [*(f"r{n}" for n in range(4 * BURST)), "child"]
    dispatcher.start([admitted(name, isolation="inline") for name in names])
    draining = asyncio.create_task(dispatcher.drain(timedelta(seconds=5)))
    await settle()
    reads.set()
    for _ in range(20):
        await settle()
    assert not draining.done()
    read.set()
    await draining
    writing.cancel()

    assert sorted(each.run_id for each in ends) == sorted(names)
