"""Pulse: whether the loops still tick; what feeds a watchdog and answers a health check."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from worker.clock import Clock
from worker.telemetry.notify import Notifier

# A loop that has not come round for this many seconds does not tick.
PATIENCE = 15.0


class Pulse:
    """`ticks` give, by loop, the monotonic instant at which it last came round.

    `resting` says that a drain has ended them on purpose, `status` in one line how the worker is.
    """

    def __init__(
        self,
        ticks: Mapping[str, Callable[[], float]],
        notifier: Notifier,
        clock: Clock,
        *,
        resting: Callable[[], bool],
        status: Callable[[], str],
    ) -> None:
        self._ticks = ticks
        self._notifier = notifier
        self._clock = clock
        self._status = status
        self.resting = resting

    def ages(self) -> dict[str, float]:
        """Seconds since each loop last came round."""
        now = self._clock.monotonic()
        return {name: now - ticked_at() for name, ticked_at in self._ticks.items()}

    def stalled(self) -> list[str]:
        """The loops that do not tick, though they should."""
        return [name for name, age in self.ages().items() if age > PATIENCE and not self.resting()]

    async def run(self) -> None:
        """Feed the service manager's watchdog as long as every loop ticks, and tell it how things are.

        Ends by cancellation only.
        """
        interval = self._notifier.watchdog_seconds
        while True:
            self._notifier.status(self._status())
            if not self.stalled():
                self._notifier.alive()
            await self._clock.sleep(PATIENCE if interval is None else interval / 3)
