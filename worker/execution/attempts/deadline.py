"""Deadline: asks a run to stop when its timeout has passed."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import TracebackType

from worker.execution.runners.contract import StopSignal


class Deadline:
    """`with Deadline(deadlines, stop, timeout, grace):` requests a stop for `timeout` unless left before.

    Time that the run stood frozen, because its worker had lost touch with the
    database, does not count.
    """

    __slots__ = ("_among", "_timeout", "due_at", "grace", "stop")

    def __init__(self, among: Deadlines, stop: StopSignal, timeout: timedelta, grace: timedelta) -> None:
        self._among = among
        self._timeout = timeout.total_seconds()
        self.stop = stop
        self.grace = grace.total_seconds()
        self.due_at = 0.0

    def __enter__(self) -> None:
        self.due_at = asyncio.get_running_loop().time() + self._timeout
        self._among.add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._among.discard(self)


class Deadlines:
    """All that are open, over one timer for the first of them.

    A timer each would cost an inline run more than its handler's call. Nearly all
    leave long before they are due: the timer finds out who is still there.
    """

    def __init__(self) -> None:
        self._open: set[Deadline] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, deadline: Deadline) -> None:
        self._open.add(deadline)
        if self._timer is None or deadline.due_at < self._timer.when():
            self._wake_at(deadline.due_at)

    def discard(self, deadline: Deadline) -> None:
        self._open.discard(deadline)

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._look)

    def _look(self) -> None:
        self._timer = None
        now, first = asyncio.get_running_loop().time(), float("inf")
        for deadline in list(self._open):
            due_at = deadline.due_at + deadline.stop.frozen_seconds(now)
            if due_at <= now:
                self._open.discard(deadline)
                deadline.stop.request("timeout", deadline.grace)
            else:
                first = min(first, due_at)
        if self._open:
            self._wake_at(first)
