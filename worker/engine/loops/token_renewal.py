"""Token renewal: requests tokens ahead of the scheduled times that need them, spread over the time before.

At a full hour thousands of orgs are due at once, and an issuer allows a few requests a second. Each worker
looks at the schedule and at the stored tokens, and prepares each missing one at a random time before it is
needed; by then another worker may have done so. A token that comes too late is requested by its run.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from random import Random
from typing import NamedTuple, Protocol

from worker.clock import Clock
from worker.engine.attempt.plan import HandlerRegistry
from worker.errors import DefinitionError, InvalidTrigger, Unavailable
from worker.ids import DefinitionId
from worker.model.definitions.definition import Definition, from_spec
from worker.model.orgs import OrgRef, TokenWant
from worker.model.runs.fire import is_closed
from worker.model.runs.run import Upcoming

# Definitions of one query, tokens that are looked up by one, and tokens that are prepared at the same time.
PAGE = 5_000
LOOKED_UP = 1_000
CONCURRENCY = 8
# The last part of the time ahead, a fifteenth, in which nothing should be left to do.
MARGIN_SHARE = 1 / 15
# Seconds between two looks at the schedule at least, and at what is ready.
LOOK = 5.0
TICK = 1.0
# Seconds of life that a token must have left at the scheduled time.
LEFT = 5.0


class UpcomingStore(Protocol):
    async def upcoming(
        self, after: tuple[datetime, DefinitionId] | None, ahead: timedelta, limit: int
    ) -> tuple[datetime, Sequence[Upcoming]]:
        """The time, and the definitions due within `ahead` of it in order, after the given one."""

    async def live_workers(self) -> int:
        """The number of workers that share each issuer's rate."""


class TokenPreparer(Protocol):
    async def not_covered(self, wanted: Sequence[TokenWant]) -> Sequence[TokenWant]:
        """Those whose stored token does not last `covers` seconds, in one query; raises Unavailable."""

    async def prepare(self, want: TokenWant) -> float | None:
        """Make sure that the token is there; or the seconds to call it again."""

    def ahead_in(self, issuer: str) -> float:
        """Seconds until the issuer has room for such requests: none that a run needs is waiting."""

    def share(self, workers: int) -> None:
        """Keep to one worker's part of the issuers' rates."""


class _Needs(NamedTuple):
    """What a definition needs of its token; `scopes` is None for those of its handler."""

    handler: str
    audience: str | None
    scopes: frozenset[str] | None
    variants: tuple[str, ...]
    priority: int
    max_age: timedelta | None
    calendar: Definition | None
    """The definition, if it has a calendar."""


@lru_cache(maxsize=4096)
def _needs_of(spec: str) -> _Needs | None:
    """From the JSON text of a revision, which the definitions of a template share."""
    try:
        definition = from_spec("", "", json.loads(spec))
    except DefinitionError:
        return None
    return _Needs(
        definition.handler,
        definition.audience,
        definition.scopes,
        tuple(variant.handler for variant in definition.variants),
        definition.priority,
        definition.max_claims_age,
        definition if definition.calendar_dates else None,
    )


def _is_skipped(definition: Definition, each: Upcoming) -> bool:
    """Whether what is due next is on a date of the calendar."""
    if each.next_scheduled_for is None:
        return False
    try:
        return is_closed(definition.trigger(each.org_timezone), each.next_scheduled_for)
    except InvalidTrigger:
        return False


class _Wanted(NamedTuple):
    """A token to prepare: soonest and highest priority first."""

    needed_at: float  # monotonic
    rank: int
    number: int
    want: TokenWant


@dataclass(eq=False, repr=False)
class TokenRenewal:
    """Prepares tokens for what is due within `ahead`, each once."""

    store: UpcomingStore
    tokens: TokenPreparer
    handlers: HandlerRegistry
    clock: Clock
    random: Random
    ahead: timedelta
    _after: tuple[datetime, DefinitionId] | None = None
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    # Each with the monotonic time at which it is prepared.
    _later: list[tuple[float, int, _Wanted]] = field(default_factory=list)
    _ready: dict[str, list[_Wanted]] = field(default_factory=dict)

    async def run(self) -> None:
        """Look at the schedule and prepare what is ready; ends by cancellation."""
        looked_at = float("-inf")
        interval = max(LOOK, self.ahead.total_seconds() / 180)
        while True:
            if self.clock.monotonic() - looked_at >= interval:
                looked_at = self.clock.monotonic()
                self.tokens.share(max(1, await self.store.live_workers()))
                await self.look()
            await self.work()
            await self.clock.sleep(TICK)

    async def look(self) -> None:
        """Add what has come within reach since the last look. Raises Unavailable; the next call continues."""
        while True:
            now, page = await self.store.upcoming(self._after, self.ahead, PAGE)
            monotonic = self.clock.monotonic()
            wanted = [want for each in page if (want := self._wanted(each, now, monotonic)) is not None]
            missing = await self._missing(wanted)
            for want in missing:
                spread = want.needed_at - monotonic - self.ahead.total_seconds() * MARGIN_SHARE
                self._put(want, monotonic + (self.random.uniform(0.0, spread) if spread > 0 else 0.0))
            if page:
                self._after = (page[-1].next_fire_at, page[-1].definition_id)
            elif self._after is None or self._after[0] < now:
                self._after = None
            if len(page) < PAGE:
                return

    async def work(self) -> None:
        """Prepare what is ready, a few at a time, the soonest first."""
        now = self.clock.monotonic()
        due: list[_Wanted] = []
        while self._later and self._later[0][0] <= now:
            due.append(heapq.heappop(self._later)[2])
        # `prepare` looks again: this saves the looks at what other workers have prepared.
        with suppress(Unavailable):
            due = await self._missing(due)
        for wanted in due:
            heapq.heappush(self._ready.setdefault(wanted.want.issuer, []), wanted)
        preparing = [
            self._prepare(issuer, ready)
            for issuer, ready in self._ready.items()
            for _ in range(min(CONCURRENCY, len(ready)))
        ]
        await asyncio.gather(*preparing)

    async def _missing(self, wanted: Sequence[_Wanted]) -> list[_Wanted]:
        """Those whose token is not stored, or does not live long enough. Raises Unavailable."""
        missing: list[_Wanted] = []
        now = self.clock.monotonic()
        for start in range(0, len(wanted), LOOKED_UP):
            part = [
                each._replace(want=each.want._replace(covers=each.needed_at - now + LEFT))
                for each in wanted[start : start + LOOKED_UP]
            ]
            wants = set(await self.tokens.not_covered([each.want for each in part]))
            missing += [each for each in part if each.want in wants]
        return missing

    def _wanted(self, each: Upcoming, now: datetime, monotonic: float) -> _Wanted | None:
        """The token that a definition will need; None if it is left to the run."""
        needs = _needs_of(each.spec) if each.spec else None
        # Those of paused or suspended orgs have no code here.
        if needs is None or not each.org_code:
            return None
        if needs.max_age is not None and needs.max_age < self.ahead:
            return None
        if needs.calendar is not None and _is_skipped(needs.calendar, each):
            return None
        scopes = needs.scopes
        if scopes is None:
            entry = self.handlers.get(needs.handler)
            if entry is None:
                return None
            scopes = frozenset(entry.scopes)
        left = (each.next_fire_at - now).total_seconds()
        org, also_ask = OrgRef(each.org_id, each.org_code), self.handlers.scopes(needs.variants)
        want = TokenWant(org, each.issuer, needs.audience, scopes, also_ask, left + LEFT)
        return _Wanted(monotonic + left, -needs.priority, next(self._numbers), want)

    def _put(self, wanted: _Wanted, at: float) -> None:
        heapq.heappush(self._later, (at, wanted.number, wanted))

    async def _prepare(self, issuer: str, ready: list[_Wanted]) -> None:
        while ready and self.tokens.ahead_in(issuer) <= 0:
            wanted = heapq.heappop(ready)
            now = self.clock.monotonic()
            covers = wanted.needed_at - now + LEFT
            if covers <= LEFT:
                # Its run asks for it.
                continue
            try:
                again = await self.tokens.prepare(wanted.want._replace(covers=covers))
            except Unavailable:
                again = LOOK
            if again is not None:
                self._put(wanted, self.clock.monotonic() + again)
