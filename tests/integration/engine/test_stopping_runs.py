"""A run that is asked to stop: told at once, interrupted at half the grace, killed at its end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import until, work
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopReason, StopSignal
from worker.model.runs.outcome import Cancelled, HandedBack, Lost, Outcome, Succeeded, TimedOut


class Running:
    """A run of a handler that says when it is up, and how to stop it."""

    def __init__(self, children: ChildPool, handler: str, folder: Path, link: AnsweringWorker) -> None:
        self.stop = StopSignal()
        given = work(handler, params={"folder": str(folder)})
        self._task = asyncio.create_task(children.run(given, link, self.stop))
        self._up = folder / "up"

    async def stopped(self, reason: StopReason, grace: float) -> Outcome:
        await until(self._up.exists)
        self.stop.request(reason, grace)
        return await self._task

    async def killed(self) -> Outcome:
        await until(self._up.exists)
        self.stop.kill()
        return await self._task


@pytest.fixture
def link() -> AnsweringWorker:
    return AnsweringWorker()


@pytest.fixture
def start(children: ChildPool, tmp_path: Path, link: AnsweringWorker) -> Any:
    return lambda handler: Running(children, handler, tmp_path, link)


async def test_a_handler_that_listens_ends_by_itself(start: Any, link: AnsweringWorker) -> None:
    outcome = await start("patient").stopped("cancel", 30)

    assert outcome == Succeeded('{"ended for":"cancel"}')
    assert link.saved == [{"reason": "cancel"}]


async def test_a_handler_hands_itself_back_on_a_drain(start: Any, link: AnsweringWorker) -> None:
    assert await start("patient").stopped("drain", 30) == HandedBack()
    assert link.saved == [{"reason": "drain"}]


async def test_a_handler_that_blocks_hears_it_too(start: Any) -> None:
    assert await start("patient_blocking").stopped("suspended", 30) == Succeeded('"suspended"')


@pytest.mark.parametrize("handler", ["cleaning", "cleaning_blocking"])
async def test_half_the_grace_is_left_to_clean_up(start: Any, link: AnsweringWorker, handler: str) -> None:
    began = time.monotonic()

    outcome = await start(handler).stopped("timeout", 2)

    assert isinstance(outcome, TimedOut)
    assert link.saved == ["cleaned"]
    assert 1 <= time.monotonic() - began < 2


async def test_a_second_request_shortens_the_grace_but_keeps_the_reason(start: Any) -> None:
    running = start("stubborn")
    began = time.monotonic()
    asked = asyncio.create_task(running.stopped("drain", 60))
    await until(running.stop.requested.is_set)

    running.stop.request("cancel", 0)

    assert await asked == HandedBack()
    assert time.monotonic() - began < 10


async def test_a_run_whose_lease_is_lost_is_killed_without_a_word(start: Any, link: AnsweringWorker) -> None:
    assert isinstance(await start("cleaning").killed(), Lost)
    assert link.saved == []


async def test_a_stop_before_the_handler_is_up_ends_it_as_well(children: ChildPool, tmp_path: Path) -> None:
    stop = StopSignal()
    stop.request("cancel", 0.2)

    outcome = await children.run(work("deaf", params={"folder": str(tmp_path)}), AnsweringWorker(), stop)

    assert outcome == Cancelled("requested")


async def test_a_stop_without_grace_kills_at_once(start: Any) -> None:
    assert await start("stubborn").stopped("cancel", 0) == Cancelled("requested")
