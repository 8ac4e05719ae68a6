"""Lines and progress are written in batches, a run's last words before its end, and none twice."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt import run_log as run_log_module
from worker.engine.attempt.run_log import BATCH, RunLogWriter
from worker.errors import StoreUnavailable
from worker.ids import RunId
from worker.model.runs.run import LogLine
from worker.telemetry.masking import masker


class Store:
    def __init__(self) -> None:
        self.written: list[str] = []
        self.away = False
        self.slow: asyncio.Event | None = None

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        if self.away:
            raise StoreUnavailable("away")
        if self.slow is not None:
            await self.slow.wait()
        self.written += [row.text for row in rows]

    async def write_progress(self, rows: Sequence[tuple[RunId, int, Mapping[str, Any]]]) -> None:
        return


async def test_flush_run_are_written_before_the_end_also_behind_a_flush_that_is_on(
    clock: ManualClock,
) -> None:
    store, run = Store(), admitted("r1")
    store.slow = asyncio.Event()
    run_log = RunLogWriter(store, clock)
    run_log.line(run, "info", "stdout", "first")
    flushing = asyncio.create_task(run_log.flush())
    await asyncio.sleep(0)
    run_log.line(run, "error", "log", "last")

    words = asyncio.create_task(run_log.flush_run(run))
    await asyncio.sleep(0)
    assert not words.done()
    store.slow.set()
    await words

    assert store.written == ["first", "last"]
    await flushing


async def test_a_run_that_said_nothing_waits_for_nobody(clock: ManualClock) -> None:
    store = Store()
    store.slow = asyncio.Event()
    run_log = RunLogWriter(store, clock)
    run_log.line(admitted("r1"), "info", "stdout", "another's")

    await run_log.flush_run(admitted("r2"))

    assert store.written == []


async def test_lines_wait_while_the_database_is_away_and_keep_their_order(clock: ManualClock) -> None:
    masker.register("canary-5ecret-value")
    store, run = Store(), admitted("r1")
    store.away = True
    run_log = RunLogWriter(store, clock)
    run_log.line(run, "info", "stdout", "one canary-5ecret-value")
    await run_log.flush_run(run)
    run_log.line(run, "info", "stdout", "two")

    store.away = False
    await run_log.flush()

    assert store.written == ["one [masked]", "two"]


async def test_long_and_short_lines_keep_their_order(clock: ManualClock) -> None:
    masker.register("canary-5ecret-value")
    store, run = Store(), admitted("r1")
    run_log = RunLogWriter(store, clock)
    texts = ["one", "canary-5ecret-value " * 3000, "three", "x" * 20_000, "five"]
    for text in texts:
        run_log.line(run, "info", "log", text)

    await run_log.flush()

    assert [line[:9].rstrip() for line in store.written] == ["one", "[masked]", "three", "x" * 9, "five"]


@pytest.mark.parametrize("batch", [BATCH, 1_000_000], ids=["", "control"])
async def test_a_turn_of_the_loop_has_a_few_lines_only(
    batch: int, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log_module, "BATCH", batch)
    run_log, run = RunLogWriter(Store(), clock), admitted("r1")
    for _ in range(7_000):
        run_log.line(run, "info", "stdout", "")
    flushing, most, left = asyncio.create_task(run_log.flush()), 0, 7_000
    while not flushing.done():
        await asyncio.sleep(0)
        most, left = max(most, left - len(run_log._said)), len(run_log._said)

    assert left == 0
    assert (most <= BATCH) == (batch == BATCH)


async def test_a_flush_that_is_cancelled_while_it_masks_loses_nothing(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run = Store(), admitted("r1")
    run_log = RunLogWriter(store, clock)
    run_log.line(run, "info", "log", "first")
    never = asyncio.Event()
    with monkeypatch.context() as patched:
        patched.setattr(run_log_module, "mask_each", lambda texts: never.wait())
        flushing = asyncio.create_task(run_log.flush())
        await asyncio.sleep(0)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
    run_log.line(run, "info", "log", "second")

    await run_log.flush_run(run)

    assert store.written == ["first", "second"]
