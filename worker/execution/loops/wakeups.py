"""Wakeups: wait for a signal or a timeout, and hint other workers at new work, at most ten times a second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from worker.clock import Clock
from worker.errors import Unavailable


async def woken(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most `seconds` on the monotonic clock; whether it was set."""
    if event.is_set():
        return True
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


# Seconds between two hints: each is a transaction that makes others wait for their commit.
PAUSE = 0.1


class Wakeups:
    """Sends one hint for all that was said since the last; a poll finds what a lost one meant."""

    def __init__(self, send: Callable[[], Awaitable[None]], clock: Clock) -> None:
        self._send = send
        self._clock = clock
        self._some = asyncio.Event()

    def say(self) -> None:
        """There is work for whoever has a free slot."""
        self._some.set()

    async def run(self) -> None:
        """Pass hints on for ever; ends by cancellation only."""
        while True:
            await self._some.wait()
            self._some.clear()
            with suppress(Unavailable):
                await self._send()
            await self._clock.sleep(PAUSE)
