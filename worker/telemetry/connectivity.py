"""Connectivity: whether a service answers, from the outcome of all requests to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.clock import Clock

# Seconds between two reported losses: one of many sessions may break again and again.
QUIET = 5.0


@dataclass(eq=False, repr=False)
class Connectivity:
    """Tracks whether a service answers, in any thread.

    `on_lost` gets the error of the first request that is not answered, `on_back` the seconds until one is
    answered again.
    """

    clock: Clock
    on_lost: Callable[[str], object]
    on_back: Callable[[float], object]
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _lost_at: float | None = field(default=None, init=False)
    _answered_at: float = field(default=float("-inf"), init=False)
    _reported: bool = field(default=False, init=False)
    _reported_at: float = field(default=float("-inf"), init=False)

    def started(self) -> float:
        """When a request starts: pass it to `failed` or `answered`."""
        return self.clock.monotonic()

    def failed(self, error: str, started_at: float) -> None:
        """A request was not answered."""
        with self._lock:
            if started_at < self._answered_at:
                # A later request was answered: this one went to a server that is gone.
                return
            now = self.clock.monotonic()
            if self._lost_at is None:
                self._lost_at = now
            report = not self._reported and now - self._reported_at >= QUIET
            if report:
                self._reported, self._reported_at = True, now
        if report:
            self.on_lost(error)

    def answered(self, started_at: float) -> None:
        """A request was answered."""
        self._answered_at = max(self._answered_at, started_at)
        if self._lost_at is None:
            return
        with self._lock:
            lost_at, reported = self._lost_at, self._reported
            self._lost_at, self._reported = None, False
        if reported and lost_at is not None:
            self.on_back(round(self.clock.monotonic() - lost_at, 1))
