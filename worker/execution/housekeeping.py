"""Housekeeping: the chores that APScheduler ticks; nothing that keeps a lease alive is among them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from worker.errors import Unavailable
from worker.telemetry.events import emit

Chore = Callable[[], Awaitable[None]]


class Housekeeping:
    """Runs each chore at its interval, one at a time; one that fails is told and tried again."""

    def __init__(self) -> None:
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        # It warns at each tick that a chore still runs, which is what happens while the database is away.
        logging.getLogger("apscheduler.scheduler").setLevel(logging.ERROR)

    def every(self, seconds: float, name: str, chore: Chore) -> None:
        """Add a chore; a tick that comes while it still runs is left out."""

        async def tick() -> None:
            try:
                await chore()
            except (Unavailable, asyncio.CancelledError):
                # Cancelled it is at the end only; the scheduler would call that an error.
                return
            except Exception as error:
                emit("loop.failed", loop=name, error=type(error).__name__)

        self._scheduler.add_job(
            tick,
            IntervalTrigger(seconds=seconds),
            id=name,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )

    def start(self) -> None:
        self._scheduler.start()

    def stop(self) -> None:
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
