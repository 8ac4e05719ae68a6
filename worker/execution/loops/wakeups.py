"""Wakeups: wait for an event or a timeout, and wake other workers at most ten times a second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from worker.clock import Clock
from worker.errors import Unavailable

# Seconds between two notifications: each is a transaction that delays other commits.
PAUSE = 0.1


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, at most `seconds` on the monotonic clock."""
    if not event.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()


class Wakeups:
    """Notifies other workers of new work. A lost notification is harmless, because they also poll."""

    def __init__(self, send: Callable[[], Awaitable[None]], clock: Clock) -> None:
        self._send = send
        self._clock = clock
        self._requested = asyncio.Event()

    def request(self) -> None:
        self._requested.set()

    async def run(self) -> None:
        while True:
            await self._requested.wait()
            self._requested.clear()
            with suppress(Unavailable):
                await self._send()
            await self._clock.sleep(PAUSE)
