"""An event loop on a settable clock: where nothing is left to do but wait, the clock leaps there."""

from __future__ import annotations

import asyncio
import selectors
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, TypeVarTuple, Unpack

from worker.clock import from_text
from worker.definitions.units import parse_duration

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Seconds of real time in one wait for a thread or a socket, after which the clock has moved as far.
SLICE = 0.02
# A thread that waits for work stands in these files, and at its top in one of these functions.
_RESTING_FILES = ("/threading.py", "/queue.py", "/concurrent/futures/thread.py", "/_backends/_asyncio.py")
_RESTING = frozenset({"wait", "get", "_worker"})


class LeapingLoop(asyncio.SelectorEventLoop):
    """Its time is the clock's; real time passes only while a thread or a socket has work to do."""

    def __init__(self, clock: SettableClock) -> None:
        self._clock = clock
        self._in_threads = 0
        selector = _Leaping(clock, lambda: self._in_threads > 0)
        super().__init__(selector)
        selector.begin()

    def time(self) -> float:
        return self._clock.monotonic()

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        self._in_threads += 1
        future.add_done_callback(self._left_thread)
        return future

    def _left_thread(self, _: asyncio.Future[Any]) -> None:
        self._in_threads -= 1


class _Leaping(selectors.DefaultSelector):
    """Waits by moving the clock."""

    def __init__(self, clock: SettableClock, called: Callable[[], bool]) -> None:
        super().__init__()
        self._clock = clock
        self._called = called
        self._own_files = 0
        self._threads: frozenset[threading.Thread] = frozenset()

    def begin(self) -> None:
        """What is there now belongs to the loop and to whoever runs the tests."""
        self._own_files = len(self.get_map())
        self._threads = frozenset(threading.enumerate())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self._called() or len(self.get_map()) > self._own_files or self._others_work():
            began = time.monotonic()
            ready = super().select(SLICE if timeout is None else min(timeout, SLICE))
            self._clock.advance(time.monotonic() - began)
            return ready
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("the test waits for something that nothing will bring about")
        self._clock.advance(timeout)
        return []

    def _others_work(self) -> bool:
        """Whether a thread that was not there at the beginning does anything but wait for work."""
        started = [thread for thread in threading.enumerate() if thread not in self._threads]
        # Those of the loop's own executor are counted.
        others = [thread for thread in started if not thread.name.startswith("asyncio_")]
        if not others:
            return False
        time.sleep(SLICE / 2)  # one that was handed work a moment ago takes it up now
        frames = sys._current_frames()
        return any(thread.ident in frames and not _rests(frames[thread.ident]) for thread in others)


def _rests(frame: Any) -> bool:
    if frame.f_code.co_name not in _RESTING:
        return False
    while frame is not None:
        if not frame.f_code.co_filename.endswith(_RESTING_FILES):
            return False
        frame = frame.f_back
    return True


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
