"""When an issuer may be asked: its budget (rate, connections, pauses), circuit breaker, and parking."""

from __future__ import annotations

import asyncio
import copy
import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from worker.clock import Clock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected, Throttled
from worker.telemetry.events import emit
from worker.tokens.credentials import Credential
from worker.tokens.issuer import Issuer

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# With one for the keys and one for the discovery document: 8 connections, while the issuer responds promptly.
TOKEN_CONNECTIONS = 6
# A request without a response for this many seconds frees its slot, and sooner once TOKEN_CONNECTIONS
# requests hang, so that one hanging application delays no other org.
SLOT_SECONDS, SLOT_SECONDS_HUNG, MAX_CONNECTIONS = 1.0, 0.2, 100
# An org whose last request failed lets this many requests of others pass; one ahead of time lets all pass.
LET_PASS, LET_ALL_PASS = 50, 2**62
# Of what the issuer allows, the share that is kept for runs: below it, none is requested ahead of time.
KEPT_FOR_RUNS = 0.1
TURN_AHEAD = 0.5  # seconds until another look whether requests of runs wait
# Requests bunch up on their way; this slack keeps the rate at the issuer's end.
SLACK = 1.05
# Seconds: the first pause without a Retry-After, its maximum after doubling, and the maximum with one.
PAUSE_FIRST, PAUSE_LAST, PAUSE_LONGEST = 10.0, 300.0, 3600.0
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


class Budget:
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
        seconds = SLOT_SECONDS if hung < TOKEN_CONNECTIONS else SLOT_SECONDS_HUNG
        slot = asyncio.ensure_future(self._clock.sleep(seconds))
        slot.add_done_callback(self._free_slot)
        try:
            yield
        except Throttled as throttled:
            throttled.retry_after = self._pause(org, throttled.retry_after or 0.0)
            raise
        else:
            self._note_grant(org, sent_at)
        finally:
            slot.cancel()
            self._connections += 1
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

    def _free_slot(self, _: object) -> None:
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


WINDOW_ORGS, WINDOW_SECONDS = 20, 10.0
FEW = 5  # with fewer orgs in the window, all must fail, and at least PAIR
PAIR = 2
OPEN_SHARE, CLOSE_SHARE = 0.5, 0.25  # of the orgs in the window
CERTAIN = 100  # failures in a row of different orgs: no org can be expected to be healthy
# Seconds between two turns: a share of the time that the breaker has been open, within limits.
TURN_FIRST, TURN_LAST, TURN_SHARE = 4.0, 15.0, 0.25
# Waiting orgs return at this rate per second in total, and each after this many seconds at most.
RETURNS, RETURN_LAST = 20.0, 60.0
RETURN_LATE = 1.5  # a run may wait longer than requested by this factor


class IssuerPaused(IssuerUnavailable):
    """Nothing was sent: the issuer failed for this org and others, and the breaker is open."""

    code = "issuer_paused"


class _Outcome(NamedTuple):
    at: float
    failed: bool


class Breaker:
    """Decides from the outcomes of one issuer's requests by org who may ask. Times are monotonic."""

    def __init__(self, issuer: str, *, clock: Clock) -> None:
        self._issuer = issuer
        self._clock = clock
        self._failed: OrderedDict[str, float] = OrderedDict()
        self._window: OrderedDict[str, _Outcome] = OrderedDict()
        self._failed_in_row = 0
        self._recovered_at = 0.0
        self._opened_at: float | None = None
        self._asking: set[str] = set()
        self._next_turn = 0.0
        self._healthy_waits_until = 0.0
        self._returns: OrderedDict[str, float] = OrderedDict()
        self._last_return = 0.0

    @property
    def is_open(self) -> bool:
        """Whether requests that can wait, such as an early renewal, should."""
        return self._opened_at is not None

    def doubts(self, org: str) -> bool:
        """Whether the org's last request failed."""
        return org in self._failed

    def fails_alone(self, org: str) -> bool:
        """Whether no other org shows an outage, so that an immediate retry costs little."""
        since = self._clock.monotonic() - WINDOW_SECONDS
        others = (seen for name, seen in self._window.items() if name != org)
        return not self.is_open and not any(seen.failed and seen.at > since for seen in others)

    def check(self, org: str) -> None:
        """Raise IssuerPaused if the breaker is open, and it is not this org's turn."""
        if self._opened_at is None:
            return
        now, healthy = self._clock.monotonic(), org not in self._failed
        paused = IssuerPaused(f"issuer {self._issuer} is not responding; this org asks again later")
        if org in self._asking:
            paused.retry_after = 1.0  # its current request ends soon
            raise paused
        if healthy and self._failed_in_row < CERTAIN:
            return
        if now >= self._next_turn and (healthy or now >= self._healthy_waits_until):
            return
        paused.retry_after = self._return_in(org, now)
        if healthy:
            self._healthy_waits_until = now + paused.retry_after * RETURN_LATE
        raise paused

    @contextmanager
    def watch(self, org: str) -> Iterator[None]:
        """Let one request through, and record its outcome; raises as `check` does."""
        self.check(org)
        asked_at = self._clock.monotonic()
        probes = self._opened_at is not None
        if probes:
            self._asking.add(org)
            if org in self._failed or self._failed_in_row >= CERTAIN:
                self._next_turn = asked_at + self._turn(org)
        try:
            yield
        except BudgetPaused:
            raise  # nothing was sent
        except IssuerUnavailable:
            self._note_failure(org, asked_at)
            raise
        except (CredentialsRejected, RequestRejected, Throttled):
            self._note_response(org)
            raise
        else:
            self._note_response(org)
        finally:
            if probes:
                self._asking.discard(org)

    def _note_response(self, org: str) -> None:
        recovers = self._failed.pop(org, None) is not None
        self._failed_in_row = 0
        self._note(org, failed=False)
        if not self.is_open or not (recovers or self._share() < CLOSE_SHARE):
            return
        if recovers:
            # The outage explains all failures until now.
            self._recovered_at = self._clock.monotonic()
            self._failed.clear()
            self._window.clear()
        self._opened_at = None
        self._returns.clear()
        self._last_return = self._healthy_waits_until = 0.0
        emit("issuer.resumed", issuer=self._issuer)

    def _note_failure(self, org: str, asked_at: float) -> None:
        if asked_at < self._recovered_at:
            return  # sent during an outage that is over
        now = self._clock.monotonic()
        is_sign = org not in self._failed
        remember(self._failed, org, now, MAX_ORGS)
        if not is_sign:
            return
        self._failed_in_row += 1
        self._note(org, failed=True)
        if self.is_open:
            self._next_turn = max(self._next_turn, now + self._turn(org))
        elif self._is_outage():
            self._opened_at = now
            self._next_turn = now + TURN_FIRST
            emit("issuer.paused", issuer=self._issuer, error="unavailable", seconds=TURN_FIRST)

    def _note(self, org: str, *, failed: bool) -> None:
        """Add the newest outcome; old ones leave the window only while the breaker is closed."""
        now = self._clock.monotonic()
        remember(self._window, org, _Outcome(now, failed), WINDOW_ORGS)
        while not self.is_open and next(iter(self._window.values())).at <= now - WINDOW_SECONDS:
            self._window.popitem(last=False)

    def _share(self) -> float:
        """The share of failed orgs in the window."""
        return sum(seen.failed for seen in self._window.values()) / len(self._window)

    def _is_outage(self) -> bool:
        if len(self._window) < FEW:
            return len(self._window) >= PAIR and self._share() == 1.0
        return self._share() >= OPEN_SHARE

    def _turn(self, org: str) -> float:
        """Seconds from this org's turn to the next one."""
        if org not in self._failed or self._opened_at is None:
            return TURN_FIRST
        open_for = self._clock.monotonic() - self._opened_at
        return min(max(TURN_FIRST, open_for * TURN_SHARE), TURN_LAST)

    def _return_in(self, org: str, now: float) -> float:
        """Seconds after which the org may return; the same for all of its runs."""
        return_at = self._returns.get(org, 0.0)
        if return_at <= now:
            self._last_return = max(self._last_return + 1 / RETURNS, now + TURN_FIRST)
            return_at = min(self._last_return, now + RETURN_LAST)
            remember(self._returns, org, return_at, MAX_ORGS)
        return max(return_at - now, 1.0)


Parkable = CredentialsRejected | RequestRejected | IssuerUnavailable
MAX_PARKED = 50_000
ASKED_LONGEST = 300.0  # seconds; caps an issuer's Retry-After


class _Parked(NamedTuple):
    error: Parkable
    until: float
    failures: int
    credentials: tuple[Credential, ...]


@dataclass(eq=False, repr=False)
class Parking(Generic[K]):
    """Keys parked after a failure, for `first` to `last` seconds; new credentials release them at once."""

    first: float
    last: float
    clock: Clock
    _keys: OrderedDict[K, _Parked] = field(default_factory=OrderedDict, init=False)

    def check(self, key: K, credentials: Sequence[Credential]) -> None:
        """Raise the error that the key is parked for, with `retry_after`, if it is parked now."""
        parked = self._parked(key, credentials)
        left = parked.until - self.clock.monotonic() if parked else 0.0
        if parked and left > 0:
            # A copy: each raise of one exception would add to its traceback.
            error = copy.copy(parked.error)
            error.retry_after = left
            raise error

    def failures(self, key: K, credentials: Sequence[Credential]) -> int:
        """The number of failures in a row with these credentials."""
        parked = self._parked(key, credentials)
        return parked.failures if parked else 0

    def park(
        self, key: K, error: Parkable, credentials: Sequence[Credential], *, share: float = 1.0
    ) -> float:
        """Park the key for `share` of its time; sets the error's `retry_after` and returns the seconds."""
        failures = self.failures(key, credentials)
        seconds = min(self.first * 2.0**failures, self.last) * share
        seconds = max(seconds, min(error.retry_after or 0.0, ASKED_LONGEST))
        until = self.clock.monotonic() + seconds
        parked = _Parked(copy.copy(error), until, min(failures + 1, 20), tuple(credentials))
        remember(self._keys, key, parked, MAX_PARKED)
        error.retry_after = seconds
        return seconds

    def release(self, key: K) -> None:
        self._keys.pop(key, None)

    def release_where(self, matches: Callable[[K], bool]) -> None:
        drop_where(self._keys, matches)

    def _parked(self, key: K, credentials: Sequence[Credential]) -> _Parked | None:
        parked = self._keys.get(key)
        if parked is not None and parked.credentials != tuple(credentials):
            del self._keys[key]
            return None
        return parked


def drop_where(memory: OrderedDict[K, V], matches: Callable[[K], bool]) -> None:
    """Remove all entries whose key matches."""
    for key in [key for key in memory if matches(key)]:
        del memory[key]


def remember(memory: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Add an entry as the newest, and drop the oldest beyond `most`."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > most:
        memory.popitem(last=False)
