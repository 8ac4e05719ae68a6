"""Hints are few, however much there is to say."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from worker.errors import StoreUnavailable
from worker.execution.loops.scheduler import PAUSE, Wakeups


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
