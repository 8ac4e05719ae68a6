"""Ends are written in batches, retried while the database is away, and a bad one stands alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.fakes.clock import ManualClock, settle
from tests.unit.engine.runs import admitted, ended
from worker.engine.loops import finisher as finisher_module
from worker.engine.loops.finisher import BATCH, COLLECT, RETRY, RETRY_ASIDE, TOGETHER, WORTHWHILE, Finisher
from worker.errors import StoreUnavailable
from worker.features.hosts.wire import Malformed
from worker.ids import RunId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, Isolation
from worker.telemetry import events


class Store:
    """Keeps what is written; refuses results that hold a NUL, as PostgreSQL does."""

    def __init__(self) -> None:
        self.batches: list[list[EndedAttempt]] = []
        self.away = False
        self.fenced: set[RunId] = set()
        # An end that is refused for good, whatever it says, and one for which no answer comes.
        self.refused: RunId | None = None
        self.unanswered: RunId | None = None
        self.admission_fails = False
        self.hangs: asyncio.Event | None = None
        self.unstorable: list[tuple[RunId, type[Exception]]] = []

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        if self.away:
            raise StoreUnavailable("away")
        if any("\0" in f"{one.result}{one.definition_state}" for one in ended):
            raise ValueError("unsupported Unicode escape sequence")
        if self.refused in {one.run_id for one in ended}:
            raise Malformed("sealed: it is not that of the run")
        if self.unanswered in {one.run_id for one in ended}:
            raise StoreUnavailable("the database did not take the ends in time")
        self.batches.append(list(ended))
        return {one.run_id for one in ended} - self.fenced

    async def finish_and_admit(
        self,
        ended: Sequence[EndedAttempt],
        offered: Mapping[str, int | None],
        free: Mapping[Isolation, int],
    ) -> tuple[set[RunId], list[AdmittedRun]]:
        if self.hangs is not None:
            await self.hangs.wait()
        if self.admission_fails:
            raise RuntimeError("the admission failed")
        return await self.finish(ended), [admitted(f"new{n + 1}") for n in range(free["inline"])]


@asynccontextmanager
async def running(
    store: Store, clock: ManualClock
) -> AsyncIterator[tuple[Finisher, list[tuple[EndedAttempt, bool]]]]:
    written: list[tuple[EndedAttempt, bool]] = []
    finisher = Finisher(
        store,
        clock,
        on_written=lambda one, accepted: written.append((one, accepted)),
        on_unstorable=lambda one, error: store.unstorable.append((one.run_id, type(error))),
    )
    task = asyncio.create_task(finisher.run())
    try:
        yield finisher, written
    finally:
        task.cancel()


async def test_all_that_ended_since_the_last_flush_is_one_batch(clock: ManualClock) -> None:
    store = Store()
    async with running(store, clock) as (finisher, _):
        for number in range(BATCH + 5):
            finisher.put(ended(f"r{number}"))
        await finisher.flushed()

    assert [len(batch) for batch in store.batches] == [BATCH, 5]


async def test_ends_are_collected_while_runs_start(clock: ManualClock) -> None:
    store, starting = Store(), True
    async with running(store, clock) as (finisher, _):
        finisher.starting = lambda: starting
        finisher.put(ended("r1"))
        await settle()
        finisher.put(ended("r2"))
        await settle()
        assert store.batches == []

        starting = False
        await finisher.flushed()

    assert [len(batch) for batch in store.batches] == [2]


async def test_collected_ends_are_written_once_they_are_many_or_wait_for_long(clock: ManualClock) -> None:
    store = Store()
    async with running(store, clock) as (finisher, _):
        finisher.starting = lambda: True
        for number in range(WORTHWHILE):
            finisher.put(ended(f"r{number}"))
        await finisher.flushed()

        finisher.put(ended("last"))
        await settle()
        assert len(store.batches) == 1
        await clock.pass_time(COLLECT)
        await finisher.flushed()

    assert [len(batch) for batch in store.batches] == [WORTHWHILE, 1]


async def test_an_absent_database_is_tried_again_until_it_takes_the_ends(clock: ManualClock) -> None:
    store = Store()
    store.away = True
    async with running(store, clock) as (finisher, written):
        finisher.put(ended())
        await clock.pass_time(RETRY * 3, step=RETRY)
        assert written == []

        store.away = False
        await clock.pass_time(RETRY)

    assert [(one.run_id, accepted) for one, accepted in written] == [("r1", True)]


async def test_one_unstorable_result_fails_alone(clock: ManualClock) -> None:
    store = Store()
    async with running(store, clock) as (finisher, written):
        finisher.put(ended("good"))
        finisher.put(ended("bad", result='"\0"'))
        finisher.put(ended("worse", definition_state='{"a":"\0"}'))
        await finisher.flushed()
        await settle()

    assert {one.run_id: (one.state, one.reason) for one, _ in written} == {
        "good": ("succeeded", None),
        "bad": ("failed", "result_unstorable"),
        "worse": ("failed", "result_unstorable"),
    }
    assert store.unstorable == [("bad", ValueError), ("worse", ValueError)]


@pytest.mark.parametrize("aside", [True, False], ids=["", "control"])
async def test_an_end_that_is_refused_for_good_keeps_no_other(
    clock: ManualClock, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control repeats it until it is taken, as before: no end of the process is written any more."""
    store = Store()
    store.refused = RunId("bad")
    if not aside:

        async def repeat(self: Finisher, batch: list[EndedAttempt]) -> None:
            while batch:
                try:
                    self._report(batch, await self.store.finish(batch))
                    return
                except Malformed:
                    await self.clock.sleep(RETRY)

        monkeypatch.setattr(Finisher, "_write", repeat)
    async with running(store, clock) as (finisher, written):
        finisher.put(ended("bad"))
        finisher.put(ended("good"))
        await settle()
        finisher.put(ended("later"))
        await clock.pass_time(RETRY_ASIDE * 2, step=RETRY)

        assert [one.run_id for one, _ in written] == (["good", "later"] if aside else [])
        assert not finisher._idle.is_set()
        store.refused = None
        await clock.pass_time(RETRY_ASIDE, step=RETRY)
        await finisher.flushed()
        await settle()

    if aside:
        last, accepted = written[-1]
        assert (last.run_id, last.state, last.reason, accepted) == (
            "bad",
            "failed",
            "result_unstorable",
            True,
        )
        assert (last.error or {})["message"] == (
            "the worker does not take this end: sealed: it is not that of the run"
        )
        assert store.unstorable == [("bad", Malformed)]


@pytest.mark.parametrize("apart", [True, False], ids=["", "control"])
async def test_an_end_without_an_answer_keeps_no_other(
    clock: ManualClock, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose row is locked, or at which a host's worker fails. The control never parts a batch."""
    if not apart:
        monkeypatch.setattr(finisher_module, "TOGETHER", 10**9)
    store = Store()
    store.unanswered = RunId("stuck")
    async with running(store, clock) as (finisher, written):
        finisher.put(ended("stuck"))
        await settle()
        finisher.put(ended("good"))
        await clock.pass_time(RETRY * (TOGETHER + 1), step=RETRY)
        finisher.put(ended("later"))
        await settle()

        assert [one.run_id for one, _ in written] == (["good", "later"] if apart else [])
        store.unanswered = None
        await clock.pass_time(RETRY_ASIDE, step=RETRY)
        await finisher.flushed()

    assert sorted((one.run_id, one.state) for one, _ in written) == [
        ("good", "succeeded"),
        ("later", "succeeded"),
        ("stuck", "succeeded"),
    ]


async def test_an_outage_is_no_failure_of_an_end_that_was_put_aside(
    clock: ManualClock, emitted: list[events.Emitted]
) -> None:
    """It is told as one while the store takes others."""
    store = Store()
    store.unanswered = RunId("stuck")

    def told() -> int:
        return sum(one.event.name == "loop.failed" for one in emitted)

    async with running(store, clock) as (finisher, written):
        finisher.put(ended("stuck"))
        finisher.put(ended("good"))
        await clock.pass_time(RETRY * (TOGETHER + 1), step=RETRY)
        assert [one.run_id for one, _ in written] == ["good"]

        store.away = True
        await clock.pass_time(3 * RETRY_ASIDE, step=RETRY)
        assert told() == 0

        store.away = False
        for number in range(2):
            assert told() == 0
            finisher.put(ended(f"later {number}"))
            await clock.pass_time(RETRY_ASIDE, step=RETRY)
        assert told() == 1


async def test_an_absent_database_is_not_asked_for_each_end(clock: ManualClock) -> None:
    store = Store()
    calls = 0
    finish = store.finish

    async def counted(batch: Sequence[EndedAttempt]) -> set[RunId]:
        nonlocal calls
        calls += 1
        return await finish(batch)

    store.finish = counted  # type: ignore[method-assign]
    store.away = True
    async with running(store, clock) as (finisher, written):
        for number in range(500):
            finisher.put(ended(f"r{number}"))
        await clock.pass_time(RETRY * TOGETHER * 2, step=RETRY)
        assert calls <= 2 * (TOGETHER + finisher_module.PROBES) + 1
        store.away = False
        await clock.pass_time(RETRY)
        await finisher.flushed()

    assert len(written) == 500


async def test_an_end_that_was_fenced_out_is_told_as_such(clock: ManualClock) -> None:
    store = Store()
    store.fenced.add(RunId("r1"))
    async with running(store, clock) as (finisher, written):
        finisher.put(ended("r1"))
        finisher.put(ended("r2"))
        await finisher.flushed()

    assert [(one.run_id, accepted) for one, accepted in written] == [("r1", False), ("r2", True)]


class Filling:
    """Wants as many runs as have ended, or none, and keeps in order what happens."""

    def __init__(self) -> None:
        self.wanted = True
        self.seen: list[object] = []

    def begin(
        self, ended: Sequence[EndedAttempt]
    ) -> tuple[Mapping[str, int | None], Mapping[Isolation, int]]:
        return {"noop": None}, {"inline": len(ended) if self.wanted else 0}

    def end(self, admitted: Sequence[AdmittedRun]) -> None:
        self.seen.append([run.id for run in admitted])


async def test_slots_are_filled_with_the_ends_that_free_them(clock: ManualClock) -> None:
    store, filling = Store(), Filling()
    async with running(store, clock) as (finisher, _):
        finisher.refill_with(filling, store)
        finisher.on_written = lambda one, accepted: filling.seen.append((one.run_id, accepted))
        finisher.put(ended("r1"))
        finisher.put(ended("r2"))
        await finisher.flushed()
        filling.wanted = False
        finisher.put(ended("r3"))
        await finisher.flushed()

    assert filling.seen == [("r1", True), ("r2", True), ["new1", "new2"], ("r3", True)]
    assert [len(batch) for batch in store.batches] == [2, 1]


async def test_ends_are_written_alone_if_no_run_can_be_admitted_with_them(clock: ManualClock) -> None:
    """A fault of the admission must not fail the results."""
    store, filling = Store(), Filling()
    store.admission_fails = True
    async with running(store, clock) as (finisher, written):
        finisher.refill_with(filling, store)
        finisher.put(ended("r1"))
        await finisher.flushed()

    assert [(one.state, accepted) for one, accepted in written] == [("succeeded", True)]
    assert store.unstorable == []
    assert filling.seen == [[]]


async def test_a_cancelled_write_ends_the_filling_too(clock: ManualClock) -> None:
    store, filling = Store(), Filling()
    store.hangs = asyncio.Event()
    async with running(store, clock) as (finisher, _):
        finisher.refill_with(filling, store)
        finisher.put(ended("r1"))
        await settle()
        assert filling.seen == []
    await settle()

    assert filling.seen == [[]]


async def test_all_is_written_only_if_nothing_is_put_aside(clock: ManualClock) -> None:
    """A drain ends once all is written, and what is tried meanwhile is not."""
    store, trying = Store(), asyncio.Event()
    store.refused = RunId("bad")
    async with running(store, clock) as (finisher, written):
        finisher.put(ended("bad"))
        await settle()
        finish = store.finish

        async def slow(batch: Sequence[EndedAttempt]) -> set[RunId]:
            if batch[0].run_id == "bad":
                await trying.wait()
            return await finish(batch)

        store.finish = slow  # type: ignore[method-assign]
        await clock.pass_time(RETRY_ASIDE, step=RETRY)
        finisher.put(ended("good"))
        await settle()
        draining = asyncio.create_task(finisher.flushed())
        await settle()
        assert not draining.done()

        trying.set()
        await settle()
        assert not draining.done()
        store.refused = None
        await clock.pass_time(RETRY_ASIDE, step=RETRY)
        await draining

    assert [one.run_id for one, _ in written] == ["good", "bad"]
