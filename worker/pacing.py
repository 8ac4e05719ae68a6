"""Pacing: keeps the event loop of a worker free while it handles what others send it."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets work of at most `most` begin in one iteration of the loop; what is more waits.

    Groups take turns, and in a group the first comes first. Work that is larger alone begins in an iteration
    of its own.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun = 0
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self, size: int, group: str = "") -> None:
        """Return when work of this size may begin."""
        if self._begin(size):
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append((size, turn))
        await turn

    def _begin(self, size: int) -> bool:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # The first call, or a loop that follows one that has ended.
            self._loop, self._begun = loop, 0
            self._waiting.clear()
        if self._waiting or not self._has_room(size):
            return False
        if not self._begun:
            loop.call_soon(self._next)
        self._begun += max(size, 1)
        return True

    def _has_room(self, size: int) -> bool:
        return not self._begun or self._begun + size <= self._most

    def _next(self) -> None:
        """The next iteration begins."""
        self._begun = 0
        while self._waiting:
            group, waiting = next(iter(self._waiting.items()))
            if not self._has_room(waiting[0][0]):
                break
            size, turn = waiting.popleft()
            del self._waiting[group]
            if waiting:
                self._waiting[group] = waiting  # behind the others
            if not turn.done():
                self._begun += max(size, 1)
                turn.set_result(None)
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next)
