"""Batch loader: questions asked one by one in the same moment, answered by one query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Keys in one query.
MOST = 500


class BatchLoader(Generic[K, V]):
    """Reads by key. A thousand runs that start together make a few queries, not a thousand.

    `read` gives what there is of the keys; a key that it leaves out has the value None.
    """

    def __init__(self, read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]]) -> None:
        self._read = read
        self._asked: dict[K, asyncio.Future[V | None]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def of(self, key: K) -> V | None:
        """The value of one key; raises what `read` raises."""
        answer = self._asked.get(key)
        if answer is None:
            loop = asyncio.get_running_loop()
            answer = self._asked[key] = loop.create_future()
            if self._reading is None:
                self._reading = loop.create_task(self._answer_all())
        # Others may wait for the same: whoever gives up does so alone.
        return await asyncio.shield(answer)

    async def _answer_all(self) -> None:
        try:
            while self._asked:
                some = list(self._asked)[:MOST]
                await self._answer({key: self._asked.pop(key) for key in some})
        finally:
            self._reading = None

    async def _answer(self, asked: Mapping[K, asyncio.Future[V | None]]) -> None:
        try:
            found = await self._read(list(asked))
        except Exception as error:
            for answer in asked.values():
                answer.set_exception(error)
                # Seen, also where nobody waits any more.
                answer.exception()
            return
        for key, answer in asked.items():
            answer.set_result(found.get(key))
