"""How often and how widely one issuer is asked: rate, pause, connections."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from worker.clock import Clock
from worker.errors import Throttled
from worker.telemetry.events import emit
from worker.tokens.issuer import Issuer

# With one for the keys and one for the discovery document: 8 connections, while the issuer answers promptly.
TOKEN_CONNECTIONS = 6
# A request without an answer for this long gives its place to the next, and sooner once as many
# hang: an application that hangs holds up no other org. Seconds, and connections at most.
PLACE_SECONDS, PLACE_SECONDS_HUNG, MAX_CONNECTIONS = 1.0, 0.2, 100
# An org whose last request failed lets this many requests of others pass.
LET_PASS = 50
# Requests bunch up on their way; so much slack keeps the rate at the issuer's end.
SLACK = 1.05
PAUSE_FIRST, PAUSE_LAST, PAUSE_LONGEST = 10.0, 300.0, 3600.0
FOREVER = float("inf")


class BudgetPaused(Throttled):
    """Nothing was sent: the issuer asked for a pause, and it is not over."""


@dataclass(order=True, slots=True)
class _Waiter:
    order: int
    woken: asyncio.Event = field(default_factory=asyncio.Event, compare=False)


class Budget:
    """The token requests of one issuer: never above its configured rate, none while it is paused."""

    def __init__(self, issuer: Issuer, *, clock: Clock) -> None:
        self._name = issuer.name
        self._clock = clock
        self._line: list[_Waiter] = []
        self._numbers = itertools.count()
        self._places = TOKEN_CONNECTIONS
        self._connections = MAX_CONNECTIONS
        rate = issuer.max_requests_per_second
        self._count = max(1, int(rate))
        self._window = self._count / rate * SLACK
        self._sent: deque[float] = deque(maxlen=self._count)
        self._paused_until = 0.0
        self._throttles = 0

    @property
    def is_paused(self) -> bool:
        """Whether the issuer is paused."""
        return self._clock.monotonic() < self._paused_until

    def check(self) -> None:
        """Raise BudgetPaused while the issuer is paused."""
        left = self._paused_until - self._clock.monotonic()
        if left > 0:
            raise BudgetPaused(f"issuer {self._name} asked for fewer requests", retry_after=left)

    @asynccontextmanager
    async def request(self, *, doubtful: bool = False) -> AsyncIterator[None]:
        """Wait for a connection and for the rate, in the order of asking; then one request may be made.

        A `doubtful` one, of an org whose last request failed, lets others pass first.

        Raises:
            BudgetPaused: the issuer is paused, or became so while this one waited.
        """
        self.check()
        await self._wait_for_turn(next(self._numbers) + (LET_PASS if doubtful else 0))
        hung = (MAX_CONNECTIONS - self._connections) - (TOKEN_CONNECTIONS - self._places)
        seconds = PLACE_SECONDS if hung < TOKEN_CONNECTIONS else PLACE_SECONDS_HUNG
        place = asyncio.ensure_future(self._clock.sleep(seconds))
        place.add_done_callback(self._give_place)
        try:
            yield
        finally:
            place.cancel()
            self._connections += 1
            self._wake_next()

    def pause(self, asked: float) -> float:
        """Stop asking for as long as the issuer asked, or for a time that doubles; the seconds it will be."""
        doubling = min(PAUSE_FIRST * 2**self._throttles, PAUSE_LAST)
        seconds = min(max(asked, 1.0) if asked else doubling, PAUSE_LONGEST)
        self._throttles = min(self._throttles + 1, 10)
        now = self._clock.monotonic()
        if self._paused_until <= now:
            emit("issuer.paused", issuer=self._name, error="throttled", seconds=round(seconds, 1))
        self._paused_until = max(self._paused_until, now + seconds)
        return self._paused_until - now

    def answered(self) -> None:
        """The issuer gave a token: the next pause begins small again."""
        self._throttles = 0

    async def _wait_for_turn(self, order: int) -> None:
        waiter = _Waiter(order)
        heapq.heappush(self._line, waiter)
        try:
            while wait := self._wait_of(waiter):
                if wait == FOREVER:
                    await waiter.woken.wait()
                    waiter.woken.clear()
                else:
                    await self._clock.sleep(wait)
                self.check()
            # The connection first: requests that had paid and then waited for one would all go out at once.
            self._places -= 1
            self._connections -= 1
            self._sent.append(self._clock.monotonic())
        finally:
            self._line.remove(waiter)
            heapq.heapify(self._line)
            self._wake_next()

    def _wait_of(self, waiter: _Waiter) -> float:
        """Seconds until the first in the line may go; FOREVER for others, and without a connection."""
        if self._line[0] is not waiter or self._places <= 0 or self._connections <= 0:
            return FOREVER
        if len(self._sent) < self._count:
            return 0.0
        return max(self._sent[0] + self._window - self._clock.monotonic(), 0.0)

    def _give_place(self, _: object) -> None:
        self._places += 1
        self._wake_next()

    def _wake_next(self) -> None:
        if self._line:
            self._line[0].woken.set()
