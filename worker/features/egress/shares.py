"""Shares: what a worker leases of limits from the database for its brokers, and the pauses of the fleet.

The questions of all keys are gathered into one transaction, at most one in `SPACING` seconds. Pauses are read
with it, and once in `POLL` seconds while requests are sent or an org pauses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from worker.clock import Clock
from worker.errors import Unavailable
from worker.ids import ALL_ORGS
from worker.model.limits import (
    GATHERING,
    LIFE,
    MAX_PAUSE,
    SLOT_LIFE,
    SPACING,
    Ask,
    BucketKey,
    Limit,
    Share,
)
from worker.store import limits
from worker.store.database import Database
from worker.store.limits import Pause
from worker.telemetry.events import emit

# Seconds between two looks at the pauses, and how long they are looked at after the last request.
POLL = 0.5
ACTIVE = 5.0
# Seconds that the limits are kept before they are read again.
LIMITS_KEPT = 2.0
# The most tokens or slots of one question: it may come from a host, which speaks for itself.
MAX_COUNT = 100_000
# Keys whose grants are remembered, before those are dropped that have ended.
KEPT = 10_000
# Origins that metrics name.
MAX_ORIGINS = 100
OTHERS = "other"

OnPauses = Callable[[Sequence[Pause]], None]


class _Grant(NamedTuple):
    """Tokens that a holder may still have, by the database's time and by CLOCK_MONOTONIC."""

    tokens: int
    granted_at: float
    kept_until: float


@dataclass(eq=False, slots=True)
class _Question:
    holder: str
    ask: Ask
    answer: asyncio.Future[Share]


class Shares:
    """The shares of one worker, for its own broker and for those of hosts that ask it. On its event loop."""

    def __init__(
        self, database: Database, worker_id: str, clock: Clock, *, on_pauses: OnPauses = lambda pauses: None
    ) -> None:
        """`on_pauses` gets all pauses when they have changed; the seconds are those that are left."""
        self._database = database
        self._worker_id = worker_id
        self._clock = clock
        self._on_pauses = on_pauses
        self._questions: list[_Question] = []
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = float("-inf")
        self._granted: dict[tuple[str, BucketKey], list[_Grant]] = {}
        self._pauses: dict[tuple[str, str], float] = {}
        self._new_pauses: dict[tuple[str, str], float] = {}
        self._storing: asyncio.Task[None] | None = None
        self._told: dict[tuple[str, str], float] = {}
        self._active_until = float("-inf")
        self._active = asyncio.Event()
        self._limits: tuple[Limit, ...] = ()
        self._limits_at = float("-inf")
        self._origins: set[str] = set()

    async def share(self, ask: Ask, holder: str | None = None) -> Share:
        """What the worker, or another holder such as a host, may use of a key.

        Numbers of a holder are claims: they have a ceiling, and only what was granted here can be returned.
        A question that fails is not asked again: what it returned is gone.

        Raises:
            Unavailable: the database does not answer.
        """
        question = _Question(
            holder or self._worker_id, _bounded(ask), asyncio.get_running_loop().create_future()
        )
        self._questions.append(question)
        self.note_requests()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._answer_all())
        return await question.answer

    async def pause(self, org_id: str, origin: str, seconds: float, *, org: str = "") -> None:
        """Let the requests of an org to an origin wait, over all workers, for at most `MAX_PAUSE` seconds.

        `org` is the org's code, for the event.

        Raises:
            Unavailable: the database does not answer; the brokers of this worker still know it.
        """
        seconds = min(max(seconds, 0.0), MAX_PAUSE)
        place, until = (org_id, origin), self._clock.monotonic() + seconds
        # Many requests that were under way have the same answer.
        if until <= self._pauses.get(place, 0.0) + POLL:
            return
        self._pauses[place] = self._new_pauses[place] = until
        self._tell()
        self._active.set()
        emit("egress.paused", org=org, origin=self.label_of(origin), seconds=round(seconds, 1))
        if self._storing is None or self._storing.done():
            self._storing = asyncio.ensure_future(self._store_pauses())
        await asyncio.shield(self._storing)

    async def _store_pauses(self) -> None:
        """Store new pauses, those of many orgs in one transaction."""
        await self._clock.sleep(GATHERING)
        while self._new_pauses:
            found, self._new_pauses = self._new_pauses, {}
            now = self._clock.monotonic()
            await self._database.call(
                limits.pause, [Pause(*place, end - now) for place, end in found.items()]
            )
            await self._clock.sleep(SPACING)

    async def limits(self) -> tuple[Limit, ...]:
        """All limits, as they were at most `LIMITS_KEPT` seconds ago. Raises Unavailable if never read."""
        now = self._clock.monotonic()
        if now - self._limits_at >= LIMITS_KEPT:
            try:
                found = await self._database.call_autocommit(limits.load)
            except Unavailable:
                if self._limits_at == float("-inf"):
                    raise
            else:
                self._limits = tuple(found.values())
                self._limits_at = now
        return self._limits

    def paused_for(self, org_id: str, origin: str) -> float:
        """The seconds for which an origin still pauses an org."""
        return max(self._pauses.get((org_id, origin), 0.0) - self._clock.monotonic(), 0.0)

    def label_of(self, origin: str) -> str:
        """The origin as metrics name it: only so many, the others are `other`."""
        if origin in self._origins or len(self._origins) < MAX_ORIGINS:
            self._origins.add(origin)
            return origin
        return OTHERS

    def note_requests(self) -> None:
        """Requests are sent: other workers' pauses are looked at for a while."""
        self._active_until = self._clock.monotonic() + ACTIVE
        self._active.set()

    async def run(self) -> None:
        """Look at the pauses while there are requests or pauses, until cancelled. Raises Unavailable."""
        while True:
            await self._active.wait()
            while self._is_active():
                self._read(await self._database.call_autocommit(limits.pauses, ALL_ORGS))
                await self._clock.sleep(POLL)
            self._active.clear()

    async def close(self) -> None:
        """End what is being asked; questions that have no answer yet fail."""
        for task in (self._asking, self._storing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for question in self._questions:
            if not question.answer.done():
                question.answer.set_exception(Unavailable("the worker is stopping"))
        self._questions.clear()

    def _is_active(self) -> bool:
        return self._clock.monotonic() < self._active_until or bool(self._pauses)

    async def _answer_all(self) -> None:
        """Ask the database until no question is left."""
        await self._clock.sleep(GATHERING)
        while self._questions:
            wait = self._asked_at + SPACING - self._clock.monotonic()
            if wait > 0:
                await self._clock.sleep(wait)
            questions, self._questions = self._questions, []
            # Before the question is sent: tokens end at most `LIFE` seconds after the grant.
            self._asked_at = self._clock.monotonic()
            try:
                await self._answer(questions)
            except BaseException as error:
                failure = error if isinstance(error, Exception) else Unavailable("the worker is stopping")
                for question in questions:
                    if not question.answer.done():
                        question.answer.set_exception(failure)
                if not isinstance(error, Unavailable):
                    raise

    async def _answer(self, questions: Sequence[_Question]) -> None:
        sent = [(question.holder, self._checked(question)) for question in questions]
        found = await self._database.call(limits.share, sent)
        missing = [place for place, share in enumerate(found) if share is None]
        if missing:
            await self._database.call(limits.add_rows, {sent[place][1].key for place in missing})
            again = await self._database.call(limits.share, [sent[place] for place in missing])
            for place, share in zip(missing, again, strict=True):
                found[place] = share
        until, slots_until = self._asked_at + LIFE, self._asked_at + SLOT_LIFE
        for question, share in zip(questions, found, strict=True):
            if share is None:
                # The row was cleaned up between two statements: the next question makes it again.
                share = Share(0, 0, 0.0, SPACING)
            self._note_grant(question.holder, question.ask.key, share)
            if not question.answer.done():
                question.answer.set_result(share._replace(until=until, slots_until=slots_until))

    def _checked(self, question: _Question) -> Ask:
        """The question with no more tokens returned than its holder was granted lately."""
        ask, place = question.ask, (question.holder, question.ask.key)
        if not ask.returned:
            return ask
        grants = self._recent(place)
        returned = min(ask.returned, sum(grant.tokens for grant in grants))
        if not returned:
            return ask._replace(returned=0)
        oldest = grants[0].granted_at
        # Only the worker's own broker knows which of them were not used.
        since = max(ask.granted_at, oldest) if question.holder == self._worker_id else oldest
        self._granted[place] = _without(grants, returned)
        return ask._replace(returned=returned, granted_at=since)

    def _note_grant(self, holder: str, key: BucketKey, share: Share) -> None:
        if not share.tokens:
            return
        if len(self._granted) >= KEPT:
            for place in list(self._granted):
                if not self._recent(place):
                    del self._granted[place]
        kept_until = self._asked_at + LIFE + POLL
        grants = self._recent((holder, key))
        self._granted[holder, key] = [*grants, _Grant(share.tokens, share.granted_at, kept_until)]

    def _recent(self, place: tuple[str, BucketKey]) -> list[_Grant]:
        now = self._clock.monotonic()
        return [grant for grant in self._granted.get(place, ()) if grant.kept_until > now]

    def _read(self, found: Sequence[Pause]) -> None:
        now = self._clock.monotonic()
        # Those that are not stored yet stay.
        self._pauses = {(each.org_id, each.origin): now + each.seconds for each in found} | self._new_pauses
        self._tell()

    def _tell(self) -> None:
        """Report the pauses if one is new, or lasts longer."""
        new = {
            place: until for place, until in self._pauses.items() if until > self._told.get(place, 0.0) + POLL
        }
        self._told = {place: self._told.get(place, until) for place, until in self._pauses.items()} | new
        if new:
            now = self._clock.monotonic()
            self._on_pauses([Pause(*place, until - now) for place, until in new.items()])


def _without(grants: Sequence[_Grant], number: int) -> list[_Grant]:
    """What is left of grants without a number of tokens, the oldest first."""
    left = []
    for grant in grants:
        gone = min(grant.tokens, number)
        number -= gone
        if grant.tokens > gone:
            left.append(grant._replace(tokens=grant.tokens - gone))
    return left


def _bounded(ask: Ask) -> Ask:
    def number(value: int) -> int:
        return min(max(int(value), 0), MAX_COUNT)

    return ask._replace(
        want=number(ask.want),
        returned=number(ask.returned),
        slots=number(ask.slots),
        in_use=number(ask.in_use),
    )
