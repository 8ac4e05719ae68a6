"""Overdue monitor: reports due times that nobody fired, from a thread that no loop can hold up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from worker.clock import Clock
from worker.errors import Unavailable
from worker.telemetry.events import emit

# Looks in the time after which an instant is overdue.
LOOKS = 4


@dataclass(frozen=True, slots=True)
class Unfired:
    """The oldest instant that has come and was not fired, and how many seconds ago that was."""

    org: str
    definition: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Deadman:
    """Whom to tell that the worker is alive, and every how many seconds."""

    url: str
    every: float


class OverdueMonitor:
    """Tells `schedule.overdue` once two looks running find an instant unfired for `overdue` seconds.

    So it does within twice that time, and a database that comes back, whose instants
    are fired just then, raises no alarm. `resting` says that a drain has ended the
    loops, `alive` that they tick.
    """

    def __init__(
        self,
        oldest: Callable[[], Unfired | None],
        clock: Clock,
        *,
        overdue: float,
        resting: Callable[[], bool],
        alive: Callable[[], bool],
        deadman: Deadman | None = None,
        client: httpx.Client | None = None,
    ) -> None:
        self._oldest = oldest
        self._clock = clock
        self._overdue = overdue
        self._resting = resting
        self._alive = alive
        self._deadman = deadman
        self._client = client or httpx.Client(timeout=5.0)
        self._seen_before = False
        self._told = False
        self._ping_at = clock.monotonic()
        self._ping_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchman", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)

    def look(self) -> None:
        """Look once for what is overdue; a database that does not answer says nothing of it."""
        if self._resting():
            return
        try:
            found = self._oldest()
        except Unavailable:
            self._seen_before = False
            return
        late = found is not None and found.seconds >= self._overdue
        if found is not None and late and self._seen_before and not self._told:
            self._told = True
            emit(
                "schedule.overdue",
                org=found.org,
                definition=found.definition,
                seconds=round(found.seconds, 1),
            )
        elif not late and self._told:
            self._told = False
            emit("schedule.caught_up")
        self._seen_before = late

    def ping(self) -> None:
        """Give the sign of life if it is time and there is life."""
        now = self._clock.monotonic()
        if self._deadman is None or now < self._ping_at or not self._alive():
            return
        self._ping_at = now + self._deadman.every
        try:
            self._client.get(self._deadman.url).raise_for_status()
            self._ping_failed = False
        except httpx.HTTPError as error:
            if not self._ping_failed:
                emit("deadman.failed", error=type(error).__name__)
            self._ping_failed = True

    def _run(self) -> None:
        pause = self._overdue / LOOKS
        if self._deadman is not None:
            pause = min(pause, self._deadman.every)
        while not self._stop.wait(pause):
            for step in (self.look, self.ping):
                try:
                    step()
                except Exception as error:
                    emit("loop.failed", loop="watchman", error=type(error).__name__)
        self._client.close()
