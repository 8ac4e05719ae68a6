"""Watches the worker's loop from a thread of its own: who blocks it is told by name, and not stopped."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any, NamedTuple

from worker.telemetry.events import emit

# Seconds for which a loop may not come round, and between two looks.
PATIENCE = 1.0
TICK = 0.25


class ThisRun(NamedTuple):
    """Whose code a context belongs to; also that of tasks which the handler has started."""

    org: str
    run: str
    attempt: int
    handler: str


_watched: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

THIS_RUN: contextvars.ContextVar[ThisRun] = contextvars.ContextVar("THIS_RUN")


class LoopWatch:
    """One event for each time that the loop stands still for longer than `PATIENCE`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticked_at = 0.0

    def start(self) -> None:
        """Watch the running loop until it is closed; called again it does nothing."""
        if self._loop is not None:
            return
        self._loop = loop = asyncio.get_running_loop()
        if loop in _watched:  # by an earlier incarnation of this worker
            return
        _watched.add(loop)
        self._tick(loop)
        arguments = (loop, threading.get_ident())
        threading.Thread(target=self._watch, args=arguments, name="loop watch", daemon=True).start()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ticked_at = time.monotonic()
        loop.call_later(TICK, self._tick, loop)

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        told_of = 0.0
        while not loop.is_closed():
            began, used = time.monotonic(), time.process_time()
            time.sleep(TICK)
            now, ticked_at = time.monotonic(), self._ticked_at
            # Where this process itself was stopped, nobody in it is to blame.
            stopped = now - began > 2 * TICK and time.process_time() - used < (now - began) / 2
            if now - ticked_at > PATIENCE and ticked_at != told_of and not stopped:
                told_of = ticked_at
                frame = sys._current_frames().get(thread)
                run = _run_of(asyncio.current_task(loop))
                emit(
                    "loop.blocked",
                    **({} if run is None else run._asdict()),
                    where=None if frame is None else _place(frame),
                    seconds=round(now - ticked_at, 1),
                )


def _run_of(task: asyncio.Task[Any] | None) -> ThisRun | None:
    # `Task.get_context` came with Python 3.12.
    held = [] if task is None else gc.get_referents(task)
    context = next((each for each in held if isinstance(each, contextvars.Context)), None)
    return None if context is None else context.get(THIS_RUN)


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"
