"""Clocks. Only this module reads the wall clock, so that tests can set it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """A time source."""

    def now(self) -> datetime:
        """The current time, aware, in UTC."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; comparable between processes of one boot."""

    async def sleep(self, seconds: float) -> None:
        """Sleep on the monotonic clock."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        # Programs that only read the time do not load it.
        import asyncio

        await asyncio.sleep(seconds)
