"""How often and how widely one issuer is asked: rate, pause, connections."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import Clock
from worker.errors import Throttled
from worker.telemetry.events import emit
from worker.tokens.issuer import Issuer

# With one for the keys and one for the discovery document: 8 connections at most.
TOKEN_CONNECTIONS = 6
# Requests bunch up on their way; so much slack keeps the rate at the issuer's end.
SLACK = 1.05
PAUSE_FIRST, PAUSE_LAST, PAUSE_LONGEST = 10.0, 300.0, 3600.0


class BudgetPaused(Throttled):
    """Nothing was sent: the issuer asked for a pause, and it is not over."""


class Budget:
    """The token requests of one issuer: never above its configured rate, none while it is paused."""

    def __init__(self, issuer: Issuer, *, clock: Clock) -> None:
        self._name = issuer.name
        self._clock = clock
        self._places = asyncio.Semaphore(TOKEN_CONNECTIONS)
        self._turn = asyncio.Lock()
        rate = issuer.max_requests_per_second
        self._count = max(1, int(rate))
        self._window = self._count / rate * SLACK
        self._sent: deque[float] = deque(maxlen=self._count)
        self._paused_until = 0.0
        self._throttles = 0

    def check(self) -> None:
        """Raise BudgetPaused while the issuer is paused."""
        left = self._paused_until - self._clock.monotonic()
        if left > 0:
            raise BudgetPaused(f"issuer {self._name} asked for fewer requests", retry_after=left)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Wait for a connection and for the rate, in the order of asking; then one request may be made.

        Raises:
            BudgetPaused: the issuer is paused, or became so while this one waited.
        """
        self.check()
        # The connection first: requests that had paid and then waited for one would all go out at once.
        async with self._places:
            await self._wait_for_turn()
            yield

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

    async def _wait_for_turn(self) -> None:
        async with self._turn:
            self.check()
            while len(self._sent) == self._count:
                wait = self._sent[0] + self._window - self._clock.monotonic()
                if wait <= 0:
                    break
                await self._clock.sleep(wait)
                self.check()
            self._sent.append(self._clock.monotonic())
