"""Supervisor: watches the loops of one process, and restarts those that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier

# Seconds without an iteration after which a loop counts as stalled.
PATIENCE = 15.0
# Seconds before a loop that failed is started again.
RESTART = 1.0

Loop = Callable[[], Awaitable[None]]


class Paced(Protocol):
    """A loop that iterates often; `ticked_at` is the monotonic time of its last iteration."""

    ticked_at: float

    async def run(self) -> None:
        """Run until cancelled."""


@dataclass(eq=False, repr=False)
class Liveness:
    """Whether `loops` iterate.

    `resting` says whether a drain has stopped the loops, `status` describes the worker in one line.
    """

    loops: Mapping[str, Paced]
    notifier: Notifier
    clock: Clock
    resting: Callable[[], bool]
    status: Callable[[], str]

    def ages(self) -> dict[str, float]:
        """Seconds since the last iteration of each loop."""
        now = self.clock.monotonic()
        return {name: now - loop.ticked_at for name, loop in self.loops.items()}

    def stalled(self) -> list[str]:
        """The loops that do not iterate, though they should."""
        return [name for name, age in self.ages().items() if age > PATIENCE and not self.resting()]

    async def run(self) -> None:
        """Report the status to the service manager, and feed its watchdog while no loop is stalled."""
        interval = self.notifier.watchdog_seconds
        while True:
            self.notifier.status(self.status())
            if not self.stalled():
                self.notifier.alive()
            await self.clock.sleep(PATIENCE if interval is None else interval / 3)


async def keep_alive(name: str, loop: Loop, clock: Clock) -> None:
    """Run a loop until cancelled, again after each failure."""
    while True:
        try:
            await loop()
        except Unavailable:  # reported by the database itself
            await clock.sleep(RESTART)
        except Exception as error:
            emit("loop.failed", loop=name, error=f"{type(error).__name__}: {error}")
            await clock.sleep(RESTART)


async def cancel(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
