"""A clock that tests move by hand, a PostgreSQL database that follows it, and a short way to write a time."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from tests.fakes.postgres import kept_session

START = datetime(2030, 1, 1, tzinfo=UTC)


def utc(text: str) -> datetime:
    """The time of an ISO 8601 text; UTC if it has no offset."""
    instant = datetime.fromisoformat(text)
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


class ManualClock:
    """Satisfies `worker.clock.Clock`; time passes only when a test says so.

    `sleep` returns once `advance` has moved the monotonic clock far enough. The
    wall clock may be set anywhere, also back, without the monotonic one moving.
    """

    def __init__(self, now: datetime = START) -> None:
        self._now = now
        self._monotonic = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0
        self._on_change: Callable[[datetime], object] = lambda now: None

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self._monotonic + seconds, self._count, woken))
        await woken

    def set(self, now: datetime) -> None:
        """Set the wall clock alone, as an administrator or NTP would."""
        self._now = now
        self._on_change(now)

    def advance(self, by: float | timedelta) -> None:
        """Let time pass on both clocks, in seconds or as a timedelta, and wake sleepers that are due."""
        passed = by if isinstance(by, timedelta) else timedelta(seconds=by)
        self.set(self._now + passed)
        self._monotonic += passed.total_seconds()
        while self._sleepers and self._sleepers[0][0] <= self._monotonic:
            woken = heapq.heappop(self._sleepers)[2]
            if not woken.done():
                woken.set_result(None)

    async def pass_time(self, by: float | timedelta, *, step: float | None = None) -> None:
        """Let time pass in steps (default: all at once), and let woken tasks run after each."""
        left = by.total_seconds() if isinstance(by, timedelta) else by
        stride = left if step is None else step
        while left > 0:
            self.advance(min(stride, left))
            left -= stride
            await settle()

    @contextlib.contextmanager
    def moves(self, url: str) -> Iterator[None]:
        """Move the time of a database with this clock, for sessions that begin later.

        On PostgreSQL the store asks for it by `clock_timestamp()`, and finds a function of that name in the
        schema `public` first. A store on SQLite has a clock injected instead.
        """
        if not url.startswith("postgresql"):
            yield
            return
        connection = kept_session(url)

        def move(now: datetime) -> None:
            connection.execute(
                "CREATE OR REPLACE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
                f" AS $$ SELECT timestamptz '{now.isoformat()}' $$"
            )

        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET search_path = public, pg_catalog')
        move(self._now)
        self._on_change = move
        try:
            yield
        finally:
            self._on_change = lambda now: None
            # As it was: only an unchanged database is used again by the next test.
            connection.execute("DROP FUNCTION public.clock_timestamp()")
            connection.execute(f'ALTER DATABASE "{name}" RESET search_path')


async def settle(turns: int = 20) -> None:
    """Let every runnable task run for that many turns of the loop."""
    for _ in range(turns):
        await asyncio.sleep(0)
