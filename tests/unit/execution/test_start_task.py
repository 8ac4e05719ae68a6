from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from worker.engine.runners.contract import start_task

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO")


async def test_a_task_that_never_waits_is_done_on_return():
    caller, loop = asyncio.current_task(), asyncio.get_running_loop()
    found: list[Any] = []

    async def work() -> str:
        found.extend([asyncio.current_task(), WHO.get("nobody")])
        WHO.set("work")
        return "done"

    WHO.set("caller")
    task = start_task(work(), loop=loop, name="work", context=contextvars.Context())

    assert task.done()
    assert task.result() == "done"
    assert found == [task, "nobody"]
    assert asyncio.current_task() is caller
    assert WHO.get() == "caller"


async def test_a_task_that_waits_goes_on_in_the_loop_and_can_be_cancelled():
    loop, reached = asyncio.get_running_loop(), []

    async def work(gate: asyncio.Event) -> None:
        reached.append("start")
        async with asyncio.timeout(60):
            await gate.wait()
        reached.append("end")

    gate, never = asyncio.Event(), asyncio.Event()
    going, cancelled = start_task(work(gate), loop=loop), start_task(work(never), loop=loop)
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

    task = start_task(work(), loop=asyncio.get_running_loop())

    with pytest.raises(ValueError, match="wrong"):
        await task
    assert asyncio.current_task() is not task


async def test_what_another_thread_schedules_meanwhile_is_called_too(monkeypatch: pytest.MonkeyPatch):
    loop, called = asyncio.get_running_loop(), []
    schedule = loop.call_soon

    def schedule_two(*args: Any, **options: Any) -> asyncio.Handle:
        handle = schedule(*args, **options)
        schedule(called.append, "other")
        return handle

    async def work() -> str:
        return "done"

    monkeypatch.setattr(loop, "call_soon", schedule_two)
    task = start_task(work(), loop=loop)
    monkeypatch.undo()

    assert await task == "done"
    await asyncio.sleep(0)
    # Python 3.12 and newer schedules nothing.
    assert called in ([], ["other"])
