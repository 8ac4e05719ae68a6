"""SettableClock: stands still while there is something to do, and leaps to what is waited for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from worker.clock import from_text
from worker.definitions.units import parse_duration

START = datetime(2030, 1, 1, tzinfo=UTC)


class SettableClock:
    """Satisfies `worker.clock.Clock`; begins at 2030-01-01T00:00Z.

    While a handler of a test runs, `asyncio.sleep`, timeouts and the pauses between
    attempts take no real time. `datetime.now()` and `time.sleep` know nothing of it.
    """

    def __init__(self, now: datetime = START) -> None:
        self._now = now
        self._monotonic = 1000.0

    def now(self) -> datetime:
        """The instant it stands at, aware, in UTC."""
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def set(self, now: datetime | str) -> None:
        """Set it, such as to `2030-03-31T00:59:50Z`; nothing that waits is woken by that."""
        self._now = from_text(now) if isinstance(now, str) else now.astimezone(UTC)

    def advance(self, by: timedelta | float | str) -> None:
        """Let time pass: a timedelta, seconds, or text such as `2h`. A timeout may pass by it."""
        span = timedelta(seconds=in_seconds(by))
        self._now += span
        self._monotonic += span.total_seconds()


def in_seconds(duration: timedelta | float | str) -> float:
    """A duration as a test may give it, in seconds.

    Raises:
        ValueError: the text is no duration.
    """
    if isinstance(duration, str):
        duration = parse_duration(duration)
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
