"""Budget: when an issuer may be asked: its rate, its connections, and the pauses it asked for."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from worker.bounded import remember
from worker.clock import Clock
from worker.errors import Throttled
from worker.guard.http import Timeouts
from worker.guard.issuer import Issuer
from worker.telemetry.events import emit

# With one for the keys and one for the discovery document: 8 connections, while the issuer responds promptly.
TOKEN_CONNECTIONS = 6
# A request without a response for this many seconds frees its slot, and sooner once TOKEN_CONNECTIONS
# requests hang, so that one hanging application delays no other org.
SLOT_SECONDS = 1.0
SLOT_SECONDS_HUNG = 0.2
MAX_CONNECTIONS = 100
# An org whose last request failed lets this many requests of others pass; one ahead of time lets all pass.
LET_PASS = 50
LET_ALL_PASS = 2**62
# Of what the issuer allows, the share that is kept for runs: below it, none is requested ahead of time.
KEPT_FOR_RUNS = 0.1
TURN_AHEAD = 0.5  # seconds until another look whether requests of runs wait
# Requests bunch up on their way; this slack keeps the rate at the issuer's end.
SLACK = 1.05
# Seconds: the first pause without a Retry-After, its maximum after doubling, and the maximum with one.
PAUSE_FIRST = 10.0
PAUSE_LAST = 300.0
PAUSE_LONGEST = 3600.0
# The longest first pause of all orgs, doubling with each in a row: a throttle may mean one org's quota.
PAUSE_OF_ALL = 60.0
OWN_QUOTA = 3600.0  # seconds after an org's pause in which a throttle may still count as its own
MAX_ORGS = 10_000
FOREVER = float("inf")


class BudgetPaused(Throttled):
    """Nothing was sent: the issuer asked for a pause, and it is not over."""


@dataclass(order=True, slots=True)
class _Waiter:
    """A queued request; the lowest order goes first."""

    order: int
    number: int
    woken: asyncio.Event = field(default_factory=asyncio.Event, compare=False)
    left: bool = field(default=False, compare=False)


@dataclass(slots=True)
class _ThrottledOrg:
    """When an org was throttled (monotonic), how often in a row, and until when it waits."""

    at: float
    times: int = 0
    until: float = 0.0


class RequestBudget:
    """Limits the token requests of one issuer to its configured rate; none is sent during a pause.

    A throttle pauses the org for as long as the issuer asks, and all others for a minute at
    most, longer if it goes on. An org that is throttled again although others got
    tokens in between has used up its own quota: that pauses no other org.
    """

    def __init__(self, issuer: Issuer, *, clock: Clock) -> None:
        self._name = issuer.name
        self._clock = clock
        self._queue: list[_Waiter] = []  # a heap
        self._numbers = itertools.count()
        self._slots = TOKEN_CONNECTIONS
        self._prompt = Timeouts(SLOT_SECONDS, clock=clock)
        self._hung = Timeouts(SLOT_SECONDS_HUNG, clock=clock)
        self._connections = MAX_CONNECTIONS
        self._rate = issuer.max_requests_per_second
        self._workers = 0
        self._sent: deque[float] = deque()
        self._ahead: dict[str, _Waiter] = {}
        self.share(1)
        self._paused_until = self._full_until = 0.0
        self._pauses = 0
        self._orgs: OrderedDict[str, _ThrottledOrg] = OrderedDict()
        self._throttled: set[str] = set()  # since the last token; two are enough to know
        self._granted_at = 0.0

    @property
    def is_paused(self) -> bool:
        """Whether the issuer is paused for all orgs."""
        return self._clock.monotonic() < self._paused_until

    @property
    def ahead_in(self) -> float:
        """Seconds until a request ahead of time may be sent: none waits, and the issuer has room for more."""
        now = self._clock.monotonic()
        until = max(self._paused_until, self._full_until)
        if len(self._sent) == self._count:
            until = max(until, self._sent[0] + self._window)
        return max(until - now, TURN_AHEAD if self._queue else 0.0)

    def hurry(self, org: str) -> None:
        """Let a request ahead of time wait as others do: a run needs its token now."""
        if (waiter := self._ahead.pop(org, None)) is not None and not waiter.left:
            waiter.order = waiter.number
            heapq.heapify(self._queue)
            self._wake_next()

    def share(self, workers: int) -> None:
        """Use the part of the rate that one of this number of workers has."""
        if workers == self._workers:
            return
        self._workers = workers
        rate = self._rate / workers
        self._count = max(1, int(rate))
        self._window = self._count / rate * SLACK
        self._sent = deque(self._sent, maxlen=self._count)

    def note_room(self, share: float | None, seconds: float) -> None:
        """Note the share of its limit that the issuer still allows, and when it begins again."""
        if share is not None and share < KEPT_FOR_RUNS:
            self._full_until = self._clock.monotonic() + min(seconds, PAUSE_LAST)

    def check(self, org: str) -> None:
        """Raise BudgetPaused while the issuer or this org is paused."""
        throttled = self._orgs.get(org)
        until = max(self._paused_until, throttled.until if throttled else 0.0)
        left = until - self._clock.monotonic()
        if left > 0:
            raise BudgetPaused(f"issuer {self._name} asked for fewer requests", retry_after=left)

    @asynccontextmanager
    async def request(self, org: str, *, doubtful: bool = False, ahead: bool = False) -> AsyncIterator[None]:
        """Wait in turn for a connection and the rate; then one request may be sent.

        A `doubtful` one, of an org whose last request failed, lets others pass first; one that is
        made `ahead` of time lets all others pass.

        Raises:
            BudgetPaused: issuer or org is paused, or became so while this one waited.
            Throttled: from the request, with the seconds of the pause as `retry_after`.
        """
        self.check(org)
        await self._wait_for_turn(org, doubtful, ahead)
        sent_at = self._clock.monotonic()
        hung = (MAX_CONNECTIONS - self._connections) - (TOKEN_CONNECTIONS - self._slots)
        timeouts = self._prompt if hung < TOKEN_CONNECTIONS else self._hung
        slot = timeouts.add(self._free_slot)
        try:
            yield
        except Throttled as throttled:
            throttled.retry_after = self._pause(org, throttled.retry_after or 0.0)
            raise
        else:
            self._note_grant(org, sent_at)
        finally:
            self._connections += 1
            if timeouts.discard(slot):
                self._slots += 1
            self._wake_next()

    def _pause(self, org: str, asked: float) -> float:
        """Pause the org, and all others unless it is its own quota; returns seconds."""
        now = self._clock.monotonic()
        known = self._orgs.get(org)
        own_quota = known is not None and known.at < self._granted_at and now - known.until < OWN_QUOTA
        own = known or _ThrottledOrg(now)
        remember(self._orgs, org, own, MAX_ORGS)
        own.until = max(own.until, now + _pause_seconds(asked, own.times))
        own.at, own.times = now, min(own.times + 1, 10)
        alone = not self._throttled - {org}
        if len(self._throttled) < 2:
            self._throttled.add(org)
        if own_quota and alone:
            seconds = own.until - now
            emit("org.parked", org=org, issuer=self._name, error="throttled", seconds=round(seconds, 1))
            return seconds
        seconds = min(_pause_seconds(asked, self._pauses), PAUSE_OF_ALL * 2**self._pauses)
        if self._paused_until <= now:
            # Concurrent requests count once.
            self._pauses = min(self._pauses + 1, 10)
            emit("issuer.paused", issuer=self._name, error="throttled", seconds=round(seconds, 1))
        self._paused_until = max(self._paused_until, now + seconds)
        return max(self._paused_until, own.until) - now

    def _note_grant(self, org: str, sent_at: float) -> None:
        """A token arrived; if it was requested after a pause, the next pause starts short again."""
        if org in self._orgs:
            self._orgs[org].times = 0
        if sent_at < self._paused_until:
            return
        self._granted_at = self._clock.monotonic()
        self._throttled.clear()
        if self._pauses:
            self._pauses = 0
            emit("issuer.resumed", issuer=self._name)

    async def _wait_for_turn(self, org: str, doubtful: bool, ahead: bool) -> None:
        number = next(self._numbers)
        waiter = _Waiter(number + (LET_ALL_PASS if ahead else LET_PASS if doubtful else 0), number)
        if ahead:
            self._ahead[org] = waiter
        heapq.heappush(self._queue, waiter)
        try:
            while wait := self._wait_of(waiter):
                if wait == FOREVER:
                    await waiter.woken.wait()
                    waiter.woken.clear()
                else:
                    await self._clock.sleep(wait)
                self.check(org)
            # The connection first: requests that were counted and then waited for one would leave in a burst.
            self._slots -= 1
            self._connections -= 1
            self._sent.append(self._clock.monotonic())
        finally:
            waiter.left = True
            if self._ahead.get(org) is waiter:
                del self._ahead[org]
            self._wake_next()

    def _wait_of(self, waiter: _Waiter) -> float:
        """Seconds until the first in the queue may go; FOREVER for others, and without a connection."""
        if self._queue[0] is not waiter or self._slots <= 0 or self._connections <= 0:
            return FOREVER
        if len(self._sent) < self._count:
            return 0.0
        return max(self._sent[0] + self._window - self._clock.monotonic(), 0.0)

    def _free_slot(self) -> None:
        self._slots += 1
        self._wake_next()

    def _wake_next(self) -> None:
        while self._queue and self._queue[0].left:
            heapq.heappop(self._queue)
        if self._queue:
            self._queue[0].woken.set()


def _pause_seconds(asked: float, times: int) -> float:
    """The pause after this many throttles in a row: as asked, else doubling."""
    return min(max(asked, 1.0) if asked else min(PAUSE_FIRST * 2**times, PAUSE_LAST), PAUSE_LONGEST)
