"""Single flight: what many ask for at once is fetched once, and no waiter's cancellation ends it."""

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
    """Work under way, one task a key; each runs to its end whoever waits for it."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[V]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._tasks

    def start(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> asyncio.Task[V]:
        """The task that is under way for this key, or a new one."""
        task = self._tasks.get(key)
        if task is None:
            # Work for many is not done in the context of whoever happened to ask first.
            loop = asyncio.get_running_loop()
            task = self._tasks[key] = loop.create_task(work(), context=contextvars.Context())
            task.add_done_callback(lambda done: self._ended(key, done))
        return task

    async def join(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """What the work yields, shared with everyone who asks before it has ended."""
        return await asyncio.shield(self.start(key, work))

    async def close(self) -> None:
        """Cancel all that is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        # Asking for the exception says that it was seen: perhaps nobody waits for it any more.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, WorkerError):
            emit("loop.failed", loop="tokens", error=type(error).__name__)
