"""Pacing: keeps the event loop of a worker free while it handles what others send it."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Characters of text that are worked on in one iteration of a loop. Masking takes 0.2 to 0.4 µs for each.
AT_ONCE = 16 * 1024


class Turns:
    """Lets work of at most `most` begin in one iteration of the loop; what is more waits, first come first.

    Work that is larger alone begins in an iteration of its own.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self, size: int) -> None:
        """Return when work of this size may begin."""
        if self._begin(size):
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        await turn

    def fits(self, size: int) -> bool:
        """Begin work of this size, unless it has to wait."""
        return self._begin(size)

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
        while self._waiting and self._has_room(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._begun += max(size, 1)
                turn.set_result(None)
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next)


_turns = Turns(AT_ONCE)
# One thread: more of them would take the interpreter from the loop as often as it asks for it.
_thread = ThreadPoolExecutor(1, thread_name_prefix="texts")


async def pace(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(*args)`, which takes time in proportion to `size` characters of text.

    Little is done at once; what is more than `AT_ONCE` in an iteration of the loop is done in a thread,
    which must not hold the interpreter lock for long: `json.loads` does, for all of its text.
    """
    if size <= AT_ONCE and _turns.fits(size):
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_thread, lambda: work(*args, **kwargs))


# No match of a pattern of words, tokens or base64 goes beyond such a character.
_BETWEEN = re.compile(r"[^A-Za-z0-9_+/.=~%-]")


def in_steps(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """`pattern.finditer(text)` for a pattern of words, in steps that hold the interpreter lock briefly.

    Otherwise one search holds it until the next match, which may be a MiB away.
    """
    start = 0
    while start < len(text):
        after = _BETWEEN.search(text, start + AT_ONCE)
        end = len(text) if after is None else after.start()
        yield from pattern.finditer(text, start, end)
        start = end
