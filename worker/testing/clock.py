"""An event loop on a settable clock: when everything waits, the clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

from worker.clock import from_text
from worker.handlers.results import Duration, as_timedelta

# Seconds of real time for one wait for a thread or a socket; the clock advances by as much.
SLICE = 0.02
TICK = 1e-6
# The files on the stack of an idle thread, and the functions at its top.
_IDLE_FILES = ("/threading.py", "/queue.py", "/concurrent/futures/thread.py", "/_backends/_asyncio.py")
_IDLE = frozenset({"wait", "get", "_worker"})


class LeapingLoop(asyncio.SelectorEventLoop):
    """Uses the clock's time; real time passes only while a thread or a socket is busy."""

    def __init__(self, clock: SettableClock) -> None:
        self._clock = clock
        self._leaping = _LeapingSelector(clock)
        super().__init__(self._leaping)
        self._leaping.begin()

    def time(self) -> float:
        return self._clock.monotonic()

    def run_in_executor(self, *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future: asyncio.Future[Any] = super().run_in_executor(*arguments)
        self._leaping.calls.add(future)
        future.add_done_callback(self._leaping.calls.discard)
        return future


class _LeapingSelector(selectors.DefaultSelector):
    """Waits by advancing the clock. `calls` are those in executors."""

    def __init__(self, clock: SettableClock) -> None:
        super().__init__()
        self._clock = clock
        self.calls: set[asyncio.Future[Any]] = set()

    def begin(self) -> None:
        """Exclude the files of the loop and the threads of the test runner."""
        self._own_files = len(self.get_map())
        self._threads = frozenset(threading.enumerate())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.calls or len(self.get_map()) > self._own_files or self._other_thread_works():
            began = time.monotonic()
            ready = super().select(SLICE if timeout is None else min(timeout, SLICE))
            self._clock.advance(time.monotonic() - began)
        elif not (ready := super().select(0)):
            if timeout is None:
                raise RuntimeError("the test waits for something that never happens")
            # The clock counts microseconds: less than one would never pass.
            self._clock.advance(max(timeout, TICK))
        return ready

    def _other_thread_works(self) -> bool:
        """Whether a thread that started since `begin` is not idle."""
        started = [thread for thread in threading.enumerate() if thread not in self._threads]
        # Calls in the loop's own executor are counted.
        others = [thread for thread in started if not thread.name.startswith("asyncio_")]
        if not others:
            return False
        if any(map(_has_a_call, others)):
            return True
        time.sleep(SLICE / 2)  # a thread that just received work starts on it now
        frames = sys._current_frames()
        return any(thread.ident in frames and not _is_idle(frames[thread.ident]) for thread in others)


def _has_a_call(thread: threading.Thread) -> bool:
    """Whether a thread of AnyIO has a call; under load, it may not have begun it."""
    queue = getattr(thread, "queue", None)
    return getattr(queue, "unfinished_tasks", 0) > 0


def _is_idle(frame: Any) -> bool:
    if frame.f_code.co_name not in _IDLE:
        return False
    while frame is not None:
        if not frame.f_code.co_filename.endswith(_IDLE_FILES):
            return False
        frame = frame.f_back
    return True


START = datetime(2030, 1, 1, tzinfo=UTC)


class SettableClock:
    """A `worker.clock.Clock` that starts at 2030-01-01T00:00Z.

    While a handler runs, `asyncio.sleep`, timeouts and the pauses between attempts take no
    real time. `datetime.now()` and `time.sleep` do not use this clock.
    """

    def __init__(self, now: datetime = START) -> None:
        self._now = now
        self._monotonic = 1000.0

    def now(self) -> datetime:
        """The current time; aware, in UTC."""
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def set(self, now: datetime | str) -> None:
        """Set the time, such as `2030-03-31T00:59:50Z`. This wakes nothing that waits."""
        self._now = from_text(now) if isinstance(now, str) else now.astimezone(UTC)

    def advance(self, by: Duration) -> None:
        """Advance by a timedelta, seconds, or text such as `2h`. Timeouts may expire."""
        span = as_timedelta(by)
        self._now += span
        self._monotonic += span.total_seconds()
