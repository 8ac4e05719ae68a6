"""Restarts: when the next broker starts after one has ended, and whether that none is up is a fault. Pure."""

from __future__ import annotations

from worker.clock import Clock

# Seconds between starts of a broker that does not come up, at first and at most.
RESTART = 0.05
LONGEST_RESTART = 5.0
# At most, if it does come up but ends within `STABLE` seconds of that: the next one is there within a second.
LONGEST_AFTER_UP = 0.5
STABLE = 2.0
# Seconds after which a broker that is not up is killed.
START_WITHIN = 10.0
SILENT = f"it was not up within {START_WITHIN:g} s"
WAITING = "it is not up yet"
# It is a fault if as many starts in a row have failed, or no broker was up for this many seconds. One that
# comes up and dies is not: what a run sends may be the cause, and one org must not stop those of others.
FAILED_STARTS = 2
DOWN = 5.0


class Restarts:
    """The starts and ends of one broker after another."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._up_at: float | None = None
        self._down_at = clock.monotonic()
        self._failed = 0
        self._pause = 0.0
        # How the last one ended.
        self.reason = WAITING

    @property
    def is_up(self) -> bool:
        return self._up_at is not None

    @property
    def fault(self) -> str | None:
        """Why no broker is up; None if one is, or may be in a moment."""
        if self.is_up:
            return None
        lasting = self._failed >= FAILED_STARTS or self._clock.monotonic() - self._down_at >= DOWN
        return self.reason if lasting else None

    def came_up(self) -> None:
        self._up_at, self._failed, self.reason = self._clock.monotonic(), 0, WAITING

    def retired(self) -> float:
        """It has ended on its own, for another one; returns the seconds until that starts."""
        self._up_at, self._down_at = None, self._clock.monotonic()
        return RESTART

    def ended(self, reason: str) -> float:
        """It has died, or was not started; returns the seconds until the next one starts."""
        now, up_at = self._clock.monotonic(), self._up_at
        if up_at is None:
            self._failed += 1
            longest = LONGEST_RESTART
        else:
            self._up_at, self._down_at = None, now
            longest = LONGEST_AFTER_UP
            if now - up_at >= STABLE:
                self._pause = 0.0
        self.reason = reason
        self._pause = min(max(self._pause * 2, RESTART), longest)
        return self._pause
