"""Lanes: what one key of a limit has in a broker, and the requests that wait for it. Pure.

A lane has tokens and slots that the worker leased. It asks for more as they are needed, and gives back what
nothing uses. The caller has the clock, which is CLOCK_MONOTONIC.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from worker.model.limits import SLOT_LIFE, SPACING, Ask, BucketKey, Limit, Share

Place = tuple[str, str]

# Seconds of its present use that a lane asks for in advance, so that most requests do not wait.
STOCK = 0.3
# Seconds without use after which a lane gives back what it has.
IDLE = 0.5
# Seconds until slots are renewed, and the most until a lane that waits asks again: it keeps its turn so.
RENEWAL = SLOT_LIFE * 0.4
PATIENCE = SLOT_LIFE * 0.8
# Seconds until a question is repeated that had no answer.
AGAIN = 0.5


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits, until `limit_at` at most. `group` is whose turn it takes."""

    place: Place
    group: str
    lanes: tuple[LimitLane, ...]
    limit_at: float
    granted: asyncio.Future[None]
    until: float = math.inf


class LeasedTokens(NamedTuple):
    number: int
    until: float
    granted_at: float


@dataclass(eq=False, slots=True)
class LimitLane:
    """The leased tokens and slots of one key, and the requests that wait for them, by group."""

    key: BucketKey
    limit: Limit
    groups: OrderedDict[str, OrderedDict[Waiter, None]] = field(default_factory=OrderedDict)
    waiting: int = 0
    in_use: int = 0
    held: deque[LeasedTokens] = field(default_factory=deque)
    # LeasedTokens that have ended or were too many, and the time of the oldest grant of them.
    unused: int = 0
    unused_since: float = math.inf
    slots: int = 0
    slots_until: float = 0.0
    # The slots that the database counts: also of requests that began when it had more.
    leased: int = 0
    renewed_at: float = -math.inf
    # The answer to the last question if it was less than what was wanted.
    short: bool = False
    answered_at: float = 0.0
    wait: float = 0.0
    pace: float = 0.0
    used: int = 0
    use: float = 0.0
    used_at: float = -math.inf
    measured_at: float = 0.0
    ask_at: float = 0.0
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def tokens(self, now: float) -> int:
        """The tokens that can be used now."""
        while self.held and self.held[0].until <= now:
            self._give_back(self.held.popleft())
        return sum(each.number for each in self.held)

    def is_open(self, now: float) -> bool:
        """Whether a request may begin."""
        if self.limit.rate is not None and not self.tokens(now):
            return False
        free = self.in_use < self.slots and now < self.slots_until
        return self.limit.concurrent is None or free

    def take(self, now: float) -> float:
        """Let a request begin; returns until when it may be sent."""
        until = math.inf if self.limit.concurrent is None else self.slots_until
        if self.limit.rate is not None:
            first = self.held.popleft()
            until = min(until, first.until)
            if first.number > 1:
                self.held.appendleft(first._replace(number=first.number - 1))
        self.in_use += 1
        self.used += 1
        self.used_at = now
        return until

    def drop(self) -> None:
        """Give up what was leased, without giving it back."""
        self.held.clear()
        self.unused, self.unused_since = 0, math.inf
        self.slots, self.slots_until, self.leased = 0, 0.0, 0

    def _give_all_back(self) -> None:
        while self.held:
            self._give_back(self.held.popleft())

    def _give_back(self, tokens: LeasedTokens) -> None:
        self.unused += tokens.number
        self.unused_since = min(self.unused_since, tokens.granted_at)

    def waiters(self) -> Iterator[Waiter]:
        """Those that wait, a group after the other in turn."""
        rounds = [iter(tuple(group)) for group in self.groups.values()]
        while rounds:
            left = []
            for one in rounds:
                if (waiter := next(one, None)) is not None:
                    yield waiter
                    left.append(one)
            rounds = left

    def wanting(self, now: float) -> int:
        """The requests that wait for this key, and not only for another one of theirs."""
        return sum(
            not any(lane is not self and lane.short and not lane.is_open(now) for lane in waiter.lanes)
            for waiter in self.waiters()
        )

    def stock(self, now: float) -> int:
        """The tokens to have in advance, by the present use."""
        if (passed := now - self.measured_at) >= SPACING:
            self.use = (self.use + self.used / passed) / 2 if now - self.used_at < 2 else 0.0
            self.used, self.measured_at = 0, now
        return math.ceil(self.use * STOCK) if now - self.used_at < IDLE else 0

    def delay(self, place: int, now: float) -> float:
        """The seconds that the request at this place of the queue (from 1) is expected to wait."""
        missing = place - self.tokens(now)
        if self.limit.rate is None or missing <= 0 or not self.short or self.pace <= 0:
            return 0.0
        elapsed = now - self.answered_at
        return max(self.wait + (missing - 1) / self.pace - elapsed, 0.0)

    # --- What it asks, and the answers. ---

    def question(self, now: float) -> tuple[Ask | None, float | None]:
        """What to ask now, or the seconds until then; neither if the lane is no longer in use."""
        is_limited = self.limit.concurrent is not None
        tokens = self.tokens(now)
        if not (self.waiting or now - self.used_at < IDLE or (self.in_use and is_limited)):
            self._give_all_back()
            if self.unused or (self.leased and now < self.slots_until):
                return self._ask(0, 0), None
            return None, None
        wanting, stock = self.wanting(now), self.stock(now)
        need = self.in_use + wanting if is_limited else 0
        # Slots that others may have: at once, while they wait.
        is_over = is_limited and self.leased > max(self.slots, self.in_use)
        if now < self.ask_at and not is_over:
            return None, self.ask_at - now
        want = 0
        if self.limit.rate is not None and (wanting > tokens or tokens < stock / 2):
            want = max(wanting + stock - tokens, 0)
        if want or is_over or (is_limited and self._is_due(need, now)):
            return self._ask(want, need), None
        return None, SPACING

    def _is_due(self, need: int, now: float) -> bool:
        """Whether to renew the slots, to ask for more, or to give back those that are not needed."""
        age = now - self.renewed_at
        if not (need or self.leased):
            return False
        is_other = need > self.slots or self.leased > need
        return age >= RENEWAL or (is_other and (age >= SPACING or not self.short))

    def _ask(self, want: int, slots: int) -> Ask:
        since = self.unused_since if self.unused else 0.0
        question = Ask(self.key, want, self.unused, since, slots, self.in_use)
        # If the answer is lost, they are too: given back twice, they would be used twice.
        self.unused, self.unused_since = 0, math.inf
        return question

    def answered(self, question: Ask, share: Share, now: float) -> None:
        """Take what the worker answers."""
        if share.tokens and self.limit.rate is not None:
            self.held.append(LeasedTokens(share.tokens, share.until, share.granted_at))
        self.slots, self.slots_until, self.renewed_at = share.slots, share.slots_until, now
        self.leased = max(share.slots, question.in_use) if self.limit.concurrent is not None else 0
        self.short = share.tokens < question.want or share.slots < question.slots
        self.answered_at, self.wait, self.pace = now, share.wait, share.pace
        self.ask_at = now + (min(max(share.wait, SPACING), PATIENCE) if self.short else 0.0)

    def not_answered(self, question: Ask, now: float) -> None:
        """Ask again after a while, and estimate nothing meanwhile.

        Slots that the question was to give back are left to end: it would be asked again at once.
        """
        self.leased = min(self.leased, max(self.slots, self.in_use)) if question.slots else 0
        self.ask_at = now + AGAIN
        self.short, self.pace = False, 0.0
