"""Deadline: asks a run to stop when its timeout has passed."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import TracebackType

from worker.execution.work import Stop


class Deadline:
    """`with Deadline(stop, timeout, grace):` requests a stop for `timeout` unless left before.

    Time that the run stood frozen, because its worker had lost touch with the
    database, does not count.
    """

    def __init__(self, stop: Stop, timeout: timedelta, grace: timedelta) -> None:
        self._stop = stop
        self._timeout = timeout.total_seconds()
        self._grace = grace.total_seconds()
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._handle: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        left = self._timeout - (now - self._started_at - self._stop.frozen_seconds(now))
        if left <= 0:
            self._stop.request("timeout", self._grace)
        else:
            self._handle = self._loop.call_later(left, self._check)
