"""Single flight: concurrent callers share one task; documents that are read this way and kept."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from .clock import Clock
from .errors import WorkerError
from .report import Report, log

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
MAX_AGE = 3600.0  # seconds, of a document


class SingleFlight(Generic[K, V]):
    """At most one running task per key, which a caller's cancellation does not end."""

    def __init__(self, *, report: Report = log) -> None:
        self._report = report
        self._tasks: dict[K, asyncio.Task[V]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._tasks

    def start(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> asyncio.Task[V]:
        """The running task of this key, or a new one."""
        task = self._tasks.get(key)
        if task is None:
            # The task serves all callers, so it does not inherit the first one's context.
            loop = asyncio.get_running_loop()
            task = self._tasks[key] = loop.create_task(work(), context=contextvars.Context())
            task.add_done_callback(lambda done: self._ended(key, done))
        return task

    async def join(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result of the key's task, which starts if none is running."""
        return await asyncio.shield(self.start(key, work))

    async def close(self) -> None:
        """Cancel all running tasks."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        # Retrieving the exception silences asyncio's warning when no caller is left.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, WorkerError):
            self._report("loop.failed", loop="tokens", error=type(error).__name__)


class Document(Generic[V]):
    """A document at an issuer, refreshed in the background, and kept while reading fails.

    `read` returns the content, or a text that says what is wrong; after a failure it is not
    called for a pause that doubles. Times are monotonic seconds.
    """

    def __init__(
        self,
        read: Callable[[], Coroutine[Any, Any, V | str]],
        pauses: tuple[float, float],
        *,
        clock: Clock,
        report: Report = log,
    ) -> None:
        self.content: V | None = None
        self.read_at = self.next_try = 0.0
        self.fault = ""
        self._read = read
        self._pauses = pauses
        self._failures = 0
        self._clock = clock
        self._reading: SingleFlight[None, None] = SingleFlight(report=report)

    @property
    def is_reading(self) -> bool:
        return None in self._reading

    @property
    def may_read(self) -> bool:
        """Whether the pause after a failure is over."""
        return self._clock.monotonic() >= self.next_try

    @property
    def is_due(self) -> bool:
        """Whether the content is older than an hour and may be read again; any thread may ask."""
        is_old = self._clock.monotonic() - self.read_at >= MAX_AGE
        return self.content is not None and is_old and self.may_read and not self.is_reading

    @property
    def retry_after(self) -> float:
        """Seconds until it may be read again, at least one."""
        return max(1.0, self.next_try - self._clock.monotonic())

    def refresh_if_old(self) -> None:
        """Start a read in the background if it is due."""
        if self.is_due:
            self._reading.start(None, self._refresh)

    async def fetch(self) -> V | None:
        """The content, read now; None if that fails, or failed a short time ago."""
        if not self.is_reading and not self.may_read:
            return None
        await self._reading.join(None, self._refresh)
        return None if self.fault else self.content

    async def close(self) -> None:
        await self._reading.close()

    async def _refresh(self) -> None:
        read = await self._read()
        now, (first, longest) = self._clock.monotonic(), self._pauses
        if isinstance(read, str):
            self.fault, self.next_try = read, now + min(first * 2**self._failures, longest)
            self._failures = min(self._failures + 1, 10)
        else:
            self.content, self.read_at = read, now
            self.fault, self.next_try, self._failures = "", 0.0, 0
