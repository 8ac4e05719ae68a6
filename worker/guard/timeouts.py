"""Timeouts over one sleeping task: a task for each request costs as much as verifying a token."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Callable

from .clock import Clock


class Timeouts:
    """Calls functions, each `seconds` after it was added, unless it is discarded before."""

    def __init__(self, seconds: float, *, clock: Clock) -> None:
        self._seconds = seconds
        self.clock = clock
        self._numbers = itertools.count()
        # In the order of their times, monotonic.
        self._open: dict[int, tuple[float, Callable[[], object]]] = {}
        self._waiting: asyncio.Task[None] | None = None

    def add(self, call: Callable[[], object]) -> int:
        """Its number, for `discard`."""
        number = next(self._numbers)
        self._open[number] = (self.clock.monotonic() + self._seconds, call)
        loop = asyncio.get_running_loop()
        if self._waiting is None or self._waiting.done() or self._waiting.get_loop() is not loop:
            self._waiting = loop.create_task(self._wait(), context=contextvars.Context())
        return number

    def discard(self, number: int) -> bool:
        """Whether it has not been called."""
        return self._open.pop(number, None) is not None

    async def _wait(self) -> None:
        while self._open:
            number, (due_at, call) = next(iter(self._open.items()))
            left = due_at - self.clock.monotonic()
            if left > 0:
                await self.clock.sleep(left)
            elif self.discard(number):
                call()
