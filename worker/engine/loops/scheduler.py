"""Scheduler: definition → due → run. Every replica fires; firing twice is harmless.

Other workers get a hint that there are runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from worker.clock import Clock
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.signals import wait_for
from worker.errors import Unavailable, WorkerError
from worker.model.runs.fire import decide
from worker.model.runs.run import Decision, DueDefinition, FireReport, NextFire
from worker.telemetry.events import emit

# Definitions locked by one transaction: few at first, so that their runs start at once, and while more are
# due twice as many, about 10 ms of work, which share the 2 ms that its statements take besides.
BATCH = 250
LARGER = 500
# Seconds until another look at what other workers are firing now: its rows are locked.
LOCKED = 0.02
# Until a definition that this version cannot read is tried again.
PUT_OFF = timedelta(minutes=1)
# Seconds between two notifications: each is a transaction that delays other commits.
PAUSE = 0.1


class FireStore(Protocol):
    async def fire(self, decide: Callable[[DueDefinition, datetime], Decision], *, limit: int) -> FireReport:
        """Lock what is due, decide, write; one short transaction."""


@dataclass(eq=False, repr=False)
class Scheduler:
    """Fires what is due and sleeps until the next scheduled time, at most one poll.

    `on_fired` is called after runs were inserted, so that they are admitted at once.
    """

    store: FireStore
    handlers: HandlerRegistry
    clock: Clock
    poll: float
    on_fired: Callable[[], None]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    _newest: datetime | None = None

    def __post_init__(self) -> None:
        self.ticked_at = self.clock.monotonic()

    async def run(self) -> None:
        limit = BATCH
        while True:
            self.wake.clear()
            report = await self._fire(limit)
            self.ticked_at = self.clock.monotonic()
            limit = LARGER if report.more else BATCH
            if not report.more:
                await wait_for(self.wake, self._pause(report))

    async def _fire(self, limit: int) -> FireReport:
        try:
            report = await self.store.fire(self._decide, limit=limit)
        except Unavailable:
            return FireReport()
        if report.inserted:
            self.on_fired()
        if report.inserted or report.skips or report.overlapped:
            emit(
                "runs.fired",
                count=len(report.inserted),
                overlapped=len(report.overlapped),
                skips=sum(skip.count for skip in report.skips),
            )
        self._check_clock(report.now)
        return report

    def _decide(self, due: DueDefinition, now: datetime) -> Decision:
        """Decide one definition. One that cannot be read is reported and put off; its times stay due."""
        try:
            return decide(due, now, self.handlers.declared)
        except WorkerError as error:
            emit("definition.failed", org=due.org_code, definition=due.name, error=error.message)
            again = NextFire(due.definition_id, due.next_scheduled_for, now + PUT_OFF)
            return Decision(runs=(), skips=(), next=again)

    def _pause(self, report: FireReport) -> float:
        if report.next_fire_at is None or report.now is None:
            return self.poll
        least = 0.0 if report.inserted or report.skips or report.overlapped else LOCKED
        return min(self.poll, max(least, (report.next_fire_at - report.now).total_seconds()))

    def _check_clock(self, now: datetime | None) -> None:
        """Report that the clock went back: until it catches up, nothing is due and nothing fires."""
        if now is None:
            return
        if self._newest is not None and (back := (self._newest - now).total_seconds()) > self.poll:
            emit("clock.went_back", seconds=round(back, 1))
            self._newest = now
        self._newest = now if self._newest is None else max(self._newest, now)


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
