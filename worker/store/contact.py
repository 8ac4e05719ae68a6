"""Contact: whether the database answers, as those find out who ask it; told once when it is lost and back."""

from __future__ import annotations

import threading

from worker.clock import Clock
from worker.telemetry.events import emit

# Seconds between two losses that are told: one of many sessions may break again and again.
QUIET = 5.0


class Contact:
    """Hears of every question to the database, from any thread; nothing is asked for its sake."""

    def __init__(self, clock: Clock, *, tells: bool = True) -> None:
        self._clock = clock
        self._tells = tells
        self._lock = threading.Lock()
        self._lost_at: float | None = None
        self._answered_at = float("-inf")
        self._told = False
        self._told_at = float("-inf")

    def asked(self) -> float:
        """A question begins: what `failed` and `answered` are told of it."""
        return self._clock.monotonic()

    def failed(self, error: str, asked_at: float) -> None:
        """The database did not answer a question."""
        with self._lock:
            if asked_at < self._answered_at:
                # Another question, put later, was answered: this one was put to a server that is gone.
                return
            now = self._clock.monotonic()
            if self._lost_at is None:
                self._lost_at = now
            tell = self._tells and not self._told and now - self._told_at >= QUIET
            if tell:
                self._told, self._told_at = True, now
        if tell:
            emit("database.lost", error=error)

    def answered(self, asked_at: float) -> None:
        """The database did what it was asked."""
        self._answered_at = max(self._answered_at, asked_at)
        if self._lost_at is None:
            return
        with self._lock:
            lost_at, told = self._lost_at, self._told
            self._lost_at, self._told = None, False
        if told and lost_at is not None:
            emit("database.back", seconds=round(self._clock.monotonic() - lost_at, 1))
