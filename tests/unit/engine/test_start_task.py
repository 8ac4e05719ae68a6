from __future__ import annotations

import asyncio
import contextvars
import sys
from typing import Any

import pytest

from worker.engine.runners.contract import start_task

EAGER = sys.version_info >= (3, 12)
WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO")


async def test_a_task_that_never_waits_is_done_on_return():
    """From Python 3.12 on; before, the loop runs it next."""
    caller = asyncio.current_task()
    found: list[Any] = []

    async def work() -> str:
        found.extend([asyncio.current_task(), WHO.get("nobody")])
        WHO.set("work")
        return "done"

    WHO.set("caller")
    task = start_task(work(), name="work", context=contextvars.Context())

    assert task.done() == EAGER
    assert await task == "done"
    assert found == [task, "nobody"]
    assert asyncio.current_task() is caller
    assert WHO.get() == "caller"


async def test_a_task_that_waits_goes_on_in_the_loop_and_can_be_cancelled():
    reached: list[str] = []

    async def work(gate: asyncio.Event) -> None:
        reached.append("start")
        async with asyncio.timeout(60):
            await gate.wait()
        reached.append("end")

    gate, never = asyncio.Event(), asyncio.Event()
    going, cancelled = start_task(work(gate)), start_task(work(never))
    if not EAGER:
        await asyncio.sleep(0)
    assert reached == ["start", "start"]
    gate.set()
    await going
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled

    assert reached == ["start", "start", "end"]


async def test_an_error_of_the_first_step_is_that_of_the_task():
    async def work() -> None:
        raise ValueError("wrong")

    task = start_task(work())

    with pytest.raises(ValueError, match="wrong"):
        await task
    assert asyncio.current_task() is not task
