"""Ends are written in batches, retried while the database is away, and a bad one stands alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.fakes.clock import ManualClock, settle
from tests.unit.execution.runs import admitted, ended
from worker.errors import StoreUnavailable
from worker.execution.loops.finisher import BATCH, COLLECT, RETRY, WORTHWHILE, Finisher
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun, Isolation

pytestmark = pytest.mark.anyio


class Store:
    """Keeps what is written; refuses results that hold a NUL, as PostgreSQL does."""

    def __init__(self) -> None:
        self.batches: list[list[EndedAttempt]] = []
        self.away = False
        self.fenced: set[RunId] = set()
        self.admission_fails = False
        self.hangs: asyncio.Event | None = None
        self.unstorable: list[tuple[RunId, type[Exception]]] = []

    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        if self.away:
            raise StoreUnavailable("away")
        if any("\0" in f"{one.result}{one.definition_state}" for one in ended):
            raise ValueError("unsupported Unicode escape sequence")
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
