"""Steps are stored in batches, wait while the database is away, and a bad one stands alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from tests.fakes.clock import START, ManualClock, settle
from tests.unit.engine.runs import admitted
from worker.engine.attempt.inflight import InflightRun
from worker.engine.loops import step_writer
from worker.engine.loops.step_writer import BATCH, RETRY, StepWriter
from worker.engine.runners.contract import StopSignal
from worker.errors import StoreUnavailable
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.model.runs.run import NewStep, RunStep, StepPage


class Store:
    """Keeps what is written; may be away, or lose the answer to a write."""

    def __init__(self) -> None:
        self.batches: list[list[RunStep]] = []
        self.away = self.loses_answer = False
        self.fenced: set[RunId] = set()

    async def store_steps(self, rows: Sequence[RunStep]) -> set[tuple[RunId, int]]:
        if self.away:
            raise StoreUnavailable("away")
        if any("bad" in row.step.result_json for row in rows):
            raise ValueError("the database rejects it")
        self.batches.append(list(rows))
        if self.loses_answer:
            self.loses_answer = False
            raise StoreUnavailable("the connection was cut at COMMIT")
        return {(row.run.id, row.run.fencing_token) for row in rows} - {(id_, 1) for id_ in self.fenced}

    async def load_steps(self, run_id: RunId, after: int) -> StepPage:
        return StepPage()

    async def step_totals(self, run_id: RunId) -> tuple[int, int]:
        return 0, 0


def step(run: str = "r1", result: str = "1", size: int = 1) -> RunStep:
    return RunStep(admitted(run), "acme.digest", NewStep("ask", None, 1, 1, result, START, START), size)


@asynccontextmanager
async def running(store: Store, clock: ManualClock) -> AsyncIterator[StepWriter]:
    writer = StepWriter(store, clock)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()


async def test_what_arrives_together_is_one_batch(clock: ManualClock) -> None:
    store = Store()
    async with running(store, clock) as writer:
        store.fenced.add(RunId("r3"))
        assert await asyncio.gather(*(writer.store_step(step(f"r{n}")) for n in range(5))) == [
            True,
            True,
            True,
            False,
            True,
        ]
        await asyncio.gather(*(writer.store_step(step(f"r{n}")) for n in range(BATCH + 1)))

    assert [len(batch) for batch in store.batches] == [5, BATCH, 1]


async def test_a_batch_has_a_limit_of_bytes(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_writer, "BATCH_BYTES", 100)
    store = Store()
    async with running(store, clock) as writer:
        await asyncio.gather(*(writer.store_step(step(size=size)) for size in (60, 40, 1, 500, 1)))

    assert [[row.size for row in batch] for batch in store.batches] == [[60, 40], [1], [500], [1]]


async def test_steps_wait_while_the_database_is_away(clock: ManualClock) -> None:
    store = Store()
    store.away = True
    async with running(store, clock) as writer:
        task = asyncio.create_task(writer.store_step(step()))
        await settle()
        assert not task.done()
        store.away = False
        clock.advance(RETRY)
        assert await task


async def test_a_step_whose_answer_is_lost_is_written_again(clock: ManualClock) -> None:
    store = Store()
    store.loses_answer = True
    async with running(store, clock) as writer:
        task = asyncio.create_task(writer.store_step(step()))
        await settle()
        clock.advance(RETRY)
        assert await task

    assert len(store.batches) == 2


async def test_a_step_that_the_database_rejects_stands_alone(clock: ManualClock) -> None:
    store = Store()
    async with running(store, clock) as writer:
        good, bad, other = await asyncio.gather(
            *(writer.store_step(step(f"r{n}", result)) for n, result in enumerate(("1", '"bad"', "3"))),
            return_exceptions=True,
        )

    assert (good, other) == (True, True)
    assert isinstance(bad, StepError)
    assert str(bad) == "step ask: the database does not take its result (ValueError)"


async def test_a_cancelled_caller_does_not_stop_the_write(clock: ManualClock) -> None:
    store = Store()
    store.away = True
    async with running(store, clock) as writer:
        task = asyncio.create_task(writer.store_step(step()))
        await settle()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        store.away = False
        clock.advance(RETRY)
        await settle()

    assert len(store.batches) == 1


async def test_a_step_of_a_process_that_died_is_stored_before_its_end(clock: ManualClock) -> None:
    """The worker has its result already: the end of the attempt would fence it out."""
    store, inflight = Store(), InflightRun(admitted(), StopSignal())
    store.away = True
    async with running(store, clock) as writer:
        request = asyncio.create_task(inflight.store(writer.store_step(step())))
        await settle()
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        assert inflight.storing

        ending = asyncio.create_task(inflight.stored())
        await settle()
        assert not ending.done()
        store.away = False
        clock.advance(RETRY)
        await ending

    assert len(store.batches) == 1
    assert not inflight.storing
