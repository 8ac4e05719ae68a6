"""Blocking: stops a handler in a thread at its calls of `ctx`, and abandons one that makes none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import work
from worker import BlockingContext, job
from worker.clock import SystemClock
from worker.engine.runners import inline
from worker.engine.runners.contract import StopSignal
from worker.engine.runners.inline import Blocking
from worker.handlers.calls import Save
from worker.model.runs.outcome import Cancelled, Failed, Lost, Outcome


class Run:
    """One run of a function as a blocking handler."""

    def __init__(self, function: Callable[[BlockingContext], Any]) -> None:
        self.started = threading.Event()
        self.services, self.stop = AnsweringWorker(), StopSignal()

        @job("t.blocking")
        def handler(ctx: BlockingContext) -> Any:
            self.started.set()
            return function(ctx)

        runner = Blocking(SystemClock(), find=lambda entry_point: handler)
        self.task = asyncio.create_task(runner.run(work("blocking"), self.services, self.stop))

    async def stopped(self, grace: float) -> Outcome:
        await asyncio.to_thread(self.started.wait, 10)
        self.stop.request("cancel", grace)
        return await self.task


async def test_half_the_grace_is_left_to_clean_up() -> None:
    seen: list[str] = []

    def handler(ctx: BlockingContext) -> None:
        try:
            while True:
                ctx.progress(1)
        except BaseException as error:
            seen.append(type(error).__name__)
            ctx.save("cleaned")
            raise

    run = Run(handler)

    assert await run.stopped(0.2) == Cancelled("requested")
    assert seen == ["Interrupted"]
    assert run.services.saved == ["cleaned"]


async def test_a_handler_that_makes_no_call_is_abandoned_and_its_later_calls_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inline, "LAST_STEPS", 0.05)
    go_on, late = threading.Event(), threading.Event()
    seen: list[str] = []

    def handler(ctx: BlockingContext) -> None:
        go_on.wait(10)
        for _ in range(2):
            try:
                ctx.save("too late")
            except BaseException as error:
                seen.append(type(error).__name__)
        late.set()

    run = Run(handler)

    assert await run.stopped(0.05) == Cancelled("requested")
    go_on.set()
    assert await asyncio.to_thread(late.wait, 10)
    assert seen == ["Interrupted", "Interrupted"]
    assert run.services.saved == []


async def test_a_killed_run_is_lost_and_the_call_that_waits_is_interrupted() -> None:
    seen: list[str] = []

    def handler(ctx: BlockingContext) -> None:
        try:
            ctx.save("never stored")
        except BaseException as error:
            seen.append(type(error).__name__)
            raise

    run = Run(handler)
    stored = asyncio.Event()

    async def save(call: Save) -> None:
        await stored.wait()

    run.services.answers = {Save: save}
    await asyncio.to_thread(run.started.wait, 10)
    run.stop.kill()

    assert isinstance(await run.task, Lost)
    assert seen == ["Interrupted"]


async def test_a_handler_that_fails_says_how() -> None:
    def fail(ctx: BlockingContext) -> None:
        raise KeyError("missing")

    failed = await Run(fail).task

    assert isinstance(failed, Failed)
    assert failed.error.type == "KeyError"
