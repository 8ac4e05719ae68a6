"""Single flight: concurrent callers share one task, which a caller's cancellation does not end."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from worker.errors import WorkerError
from worker.telemetry.events import emit

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """At most one running task per key."""

    def __init__(self) -> None:
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
            emit("loop.failed", loop="tokens", error=type(error).__name__)
