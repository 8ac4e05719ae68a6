"""Inbox: reads what runs send, a little of it in each turn of the loop, and each run at a limited rate.

A run that floods its channel is read more slowly, and nothing is dropped: once the socket's buffer is full,
its own process waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from worker.execution.runners.child.frames import BrokenMessage, Message, RunFrames
from worker.handlers.json_scan import Scan
from worker.handlers.json_text import check_json_text, check_size

# What a message costs besides its bytes: reading one takes as long as copying so many.
MESSAGE = 4 * 1024
# Work of one turn of the loop for all runs together, in bytes; the largest message may exceed it. It is what
# the worker reads in one or two milliseconds.
TURN = 256 * 1024
# Bytes a second that are read of one channel, and how many at once. The calls of a run wait for the database
# and stay below that: 15 results of 1 MiB or 240 checkpoints of 64 KiB pass at once, then as many a second.
# A flood of small messages is read at 4,096 a second, which takes a tenth of the loop.
RATE = 16 * 1024 * 1024
BURST = 16 * 1024 * 1024
# Characters of JSON text that are checked at once.
CHECKED_AT_ONCE = 4 * 1024


class InboxTurns:
    """Shares the turns of the loop between runs, in the order in which they ask."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._left = TURN
        self._waiting: deque[Callable[[], None]] = deque()
        self._begins = False

    @property
    def left(self) -> bool:
        """Whether something may still be done in this turn."""
        return self._left > 0

    @property
    def free(self) -> bool:
        """Whether that is so and no other run waits for it."""
        return self._left > 0 and not self._waiting

    def spend(self, work: int) -> None:
        self._left -= work
        self._begin_soon()

    def wait(self, callback: Callable[[], None]) -> None:
        """Call `callback` in a later turn."""
        self._waiting.append(callback)
        self._begin_soon()

    async def whole(self) -> None:
        """Wait for a turn of which others use nothing."""
        if self._left == TURN and not self._waiting:
            self.spend(TURN)
            return
        given = asyncio.get_running_loop().create_future()

        def give() -> None:
            if not given.done():
                self._left = 0
                given.set_result(None)

        self.wait(give)
        await given

    def _begin_soon(self) -> None:
        if not self._begins:
            self._begins = True
            self._call_soon(self._begin)

    def _begin(self) -> None:
        self._begins = False
        self._left = TURN
        while self._waiting and self._left > 0:
            self._waiting.popleft()()
        if self._waiting or self._left < TURN:
            self._begin_soon()


class Timer(Protocol):
    def cancel(self) -> None: ...


class Channel(Protocol):
    """Where the data comes from. It stays with the process while `pause_reading` holds."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Inbox:
    """The messages of one run, each passed to `receive` when its turn has come.

    `holds` says that the run has to wait, until `go_on` is called. Once a message is broken, `on_broken` is
    called and nothing more is read.
    """

    def __init__(
        self,
        turns: InboxTurns,
        channel: Channel,
        receive: Callable[[Message], None],
        *,
        holds: Callable[[], bool],
        on_broken: Callable[[], None],
        time: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self._turns = turns
        self._channel = channel
        self._receive = receive
        self._holds = holds
        self._on_broken = on_broken
        self._time = time
        self._call_later = call_later
        self._frames = RunFrames()
        # Bytes that were read beyond the rate, at that time.
        self._ahead = 0.0
        self._ahead_at = time()
        # Whether the rest waits for its turn, or for its rate.
        self._queued = False
        self._timer: Timer | None = None
        self._closed = False
        self._empty = asyncio.Event()
        self._checking = asyncio.Lock()

    def feed(self, data: bytes) -> None:
        if not self._closed:
            self._frames.add(data)
            self.go_on()

    def go_on(self) -> None:
        """Read on, unless the rest waits for its turn already."""
        if not self._queued and self._timer is None and not self._closed:
            self._read(self._turns.free)

    async def emptied(self) -> None:
        """Wait until all that has come is read."""
        self._empty.clear()
        self.go_on()
        if not self._closed:
            await self._empty.wait()

    async def check(self, text: str, what: str, limit: int) -> None:
        """Raise NotStorable unless a text is JSON that can be stored; a long one is read in turns."""
        if len(text) <= CHECKED_AT_ONCE:
            return check_json_text(text, what, limit)
        check_size(text, what, limit)
        scan = Scan(text, what)
        async with self._checking:
            await self._turns.whole()
            while not scan.step():
                await self._turns.whole()

    def close(self) -> None:
        """Drop the rest: the run has ended, or its process does not keep to the protocol."""
        self._closed = True
        self._frames = RunFrames()
        self._empty.set()
        if self._timer is not None:
            self._timer.cancel()

    def _in_turn(self) -> None:
        self._queued = False
        if not self._closed:
            self._read(self._turns.left)

    def _in_time(self) -> None:
        self._timer = None
        if not self._closed:
            self._read(self._turns.free)

    def _read(self, has_turn: bool) -> None:
        try:
            while not self._holds():
                if not has_turn:
                    self._queued = True
                    self._turns.wait(self._in_turn)
                    break
                if (early := self._early()) > 0:
                    self._timer = self._call_later(early, self._in_time)
                    break
                found = self._frames.next()
                if found is None:
                    self._channel.resume_reading()
                    self._empty.set()
                    return
                message, size = found
                self._ahead += MESSAGE + size
                self._turns.spend(MESSAGE + size)
                self._receive(message)
                has_turn = self._turns.left
        except BrokenMessage:
            self.close()
            self._on_broken()
            return
        self._channel.pause_reading()

    def _early(self) -> float:
        """Seconds until the next message may be read."""
        now = self._time()
        self._ahead = max(0.0, self._ahead - (now - self._ahead_at) * RATE)
        self._ahead_at = now
        return (self._ahead - BURST) / RATE
