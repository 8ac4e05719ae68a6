"""Pacing: requests of the broker wait here for limits of their service, and for pauses that it asked for.

`lanes` has what each key of a limit leased from the worker. Nothing is used after its end on CLOCK_MONOTONIC,
so a process that was frozen sends nothing with what it held.

Imports neither an HTTP client nor a database: the broker is a small process.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from worker.features.egress.lanes import LimitLane, Place, Waiter
from worker.guard.clock import Clock
from worker.handlers.results import RateLimited
from worker.model.limits import MAX_PAUSE, MAX_WAIT, Ask, BucketKey, Limit, Share

AskForShare = Callable[[Ask], Awaitable[Share]]

# Seconds by which the ends of two pauses differ at least.
TOLERANCE = 0.1
# Pauses that are kept, before those are dropped that are over.
MAX_PAUSES = 10_000
# Origins that are counted by name.
MAX_ORIGINS = 100
OTHERS = "other"


class Stopped(Exception):
    """The broker is frozen or its lease is lost: the request was not sent."""


class OriginCounts(NamedTuple):
    """Of one origin: requests that wait now; and since the start those that waited, their seconds, those
    that were refused with `RateLimited`, and pauses.
    """

    origin: str
    waiting: int = 0
    waited: int = 0
    seconds: float = 0.0
    refused: int = 0
    pauses: int = 0


class Slot:
    """Leave to send a request while `may_send()`. `waited` is in seconds.

    `release` it when its response has ended, or when it was not sent.
    """

    def __init__(self, waited: float, may_send: Callable[[], bool], release: Callable[[], None]) -> None:
        self.waited = waited
        # False once what it leased has ended, on CLOCK_MONOTONIC, or its service has asked for a pause.
        self.may_send = may_send
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Free its slots; may be called again."""
        if self._release is not None:
            self._release()
            self._release = None


class Pacer:
    """Lets the requests of a broker begin within the limits of their origins. Used on one event loop."""

    def __init__(self, clock: Clock, ask: AskForShare) -> None:
        """`ask` gets the worker's answer to a question; it may raise any exception."""
        self._clock = clock
        self._ask = ask
        self._lanes: dict[BucketKey, LimitLane] = {}
        self._pauses: dict[Place, float] = {}
        # The futures of all that wait, by place.
        self._pending: dict[Place, set[asyncio.Future[None]]] = {}
        self._counts: dict[str, OriginCounts] = {}
        self._is_stopped = False
        # Counts the stops: what began before one does not go on after it.
        self._stops = 0

    async def acquire(
        self, org: str, origin: str, limits: Sequence[Limit], deadline: float, *, group: str = ""
    ) -> Slot:
        """Wait until a request of an org to an origin may be sent; `limits` are those of the origin.

        `deadline` is on CLOCK_MONOTONIC. Waiting requests of one `group`, such as an attempt, take turns
        with those of others; default the org.

        Raises:
            RateLimited: it would wait longer than `max_wait` of a limit, or until after the deadline.
            Stopped: the broker was stopped meanwhile.
        """
        place = (org, origin)
        started = self._clock.monotonic()
        limit_at = min(deadline, started + min((limit.max_wait for limit in limits), default=MAX_WAIT))
        stops, has_waited = self._stops, False
        while True:
            if self._is_stopped or stops != self._stops:
                raise Stopped("the broker is stopped")
            now = self._clock.monotonic()
            if (left := self._pauses.get(place, now) - now) > 0:
                if now + left > limit_at:
                    raise self._refusal(left, origin)
                has_waited = True
                await self._wait(place, self._future(), left)
                continue
            self._pauses.pop(place, None)
            lanes = tuple(self._lane(limit, org) for limit in limits)
            if all(lane.waiting == 0 and lane.is_open(now) for lane in lanes):
                until = min((lane.take(now) for lane in lanes), default=math.inf)
                break
            expected = max(lane.delay(lane.waiting + 1, now) for lane in lanes)
            if now + expected > limit_at:
                raise self._refusal(expected, origin)
            has_waited = True
            waiter = Waiter(place, group or org, lanes, limit_at, self._future())
            if await self._queue(waiter):
                until, now = waiter.until, self._clock.monotonic()
                if now < until and stops == self._stops:
                    break
                # This process was late: what it was given has ended.
                self._release(lanes)
        if has_waited:
            counts = self._counted(origin)
            self._counts[counts.origin] = counts._replace(
                waited=counts.waited + 1, seconds=counts.seconds + now - started
            )
        for lane in lanes:
            # It looks at what it has every `SPACING` seconds.
            self._serve(lane, wake=False)

        def may_send() -> bool:
            return self._pauses.get(place, 0.0) <= self._clock.monotonic() < until

        return Slot(now - started if has_waited else 0.0, may_send, lambda: self._release(lanes))

    def pause(self, org: str, origin: str, seconds: float) -> None:
        """Let the requests of an org to an origin wait; those that wait for a limit wait again."""
        now = self._clock.monotonic()
        until = now + min(seconds, MAX_PAUSE)
        if len(self._pauses) >= MAX_PAUSES:
            self._pauses = {place: end for place, end in self._pauses.items() if end > now}
        # The same one is also learned from others, by their clocks.
        if until <= self._pauses.get((org, origin), 0.0) + TOLERANCE:
            return
        self._pauses[org, origin] = until
        counts = self._counted(origin)
        self._counts[counts.origin] = counts._replace(pauses=counts.pauses + 1)
        for future in tuple(self._pending.get((org, origin), ())):
            if not future.done():
                future.cancel()

    def stop(self) -> None:
        """End all waits with Stopped, and drop what was leased: nothing that waits goes on."""
        self._is_stopped = True
        self._stops += 1
        for lane in self._lanes.values():
            lane.drop()
        for futures in self._pending.values():
            for future in tuple(futures):
                if not future.done():
                    future.set_exception(Stopped("the broker is stopped"))

    def resume(self) -> None:
        """Let new requests begin again."""
        self._is_stopped = False

    async def close(self) -> None:
        """As `stop`, and end the tasks."""
        self.stop()
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def counts(self) -> list[OriginCounts]:
        """The counts of each origin; of more than `MAX_ORIGINS`, the others are one."""
        waiting: dict[str, int] = {}
        for (_, origin), futures in self._pending.items():
            name = self._counted(origin).origin
            waiting[name] = waiting.get(name, 0) + len(futures)
        return [each._replace(waiting=waiting.get(name, 0)) for name, each in self._counts.items()]

    def _future(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def _lane(self, limit: Limit, org: str) -> LimitLane:
        key = limit.key(org)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = LimitLane(key, limit)
        lane.limit = limit
        return lane

    def _counted(self, origin: str) -> OriginCounts:
        name = origin if origin in self._counts or len(self._counts) < MAX_ORIGINS else OTHERS
        return self._counts.setdefault(name, OriginCounts(name))

    def _refusal(self, seconds: float, origin: str) -> RateLimited:
        counts = self._counted(origin)
        self._counts[counts.origin] = counts._replace(refused=counts.refused + 1)
        return RateLimited(max(seconds, 0.1), origin)

    async def _wait(self, place: Place, future: asyncio.Future[None], seconds: float) -> bool:
        """Wait for a future, at most `seconds`; returns whether it has a result. Raises its exception."""
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        pending = self._pending.setdefault(place, set())
        pending.add(future)
        try:
            await asyncio.wait((future, timer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            pending.discard(future)
            if not pending:
                self._pending.pop(place, None)
        if not future.done() or future.cancelled():
            return False
        future.result()
        return True

    async def _queue(self, waiter: Waiter) -> bool:
        """Wait for all lanes; returns False if a pause has begun. Raises RateLimited and Stopped."""
        for lane in waiter.lanes:
            lane.groups.setdefault(waiter.group, OrderedDict())[waiter] = None
            lane.waiting += 1
            self._serve(lane)
        origin = waiter.place[1]
        try:
            now = self._clock.monotonic()
            if await self._wait(waiter.place, waiter.granted, waiter.limit_at - now):
                return True
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and not waiter.granted.exception():
                self._release(waiter.lanes)
            raise
        finally:
            self._leave(waiter)
        if waiter.granted.cancelled():
            return False
        left = max((lane.delay(1, self._clock.monotonic()) for lane in waiter.lanes), default=0.0)
        raise self._refusal(max(left, 1.0), origin)

    def _leave(self, waiter: Waiter) -> None:
        for lane in waiter.lanes:
            group = lane.groups.get(waiter.group)
            if group is not None and waiter in group:
                del group[waiter]
                lane.waiting -= 1
                if not group:
                    del lane.groups[waiter.group]

    def _release(self, lanes: Sequence[LimitLane]) -> None:
        for lane in lanes:
            lane.in_use -= 1
            self._admit(lane)
            if lane.limit.concurrent is not None:
                lane.woken.set()

    def _admit(self, lane: LimitLane) -> None:
        """Let requests begin that wait for this lane, a group after the other."""
        if self._is_stopped:
            return
        now = self._clock.monotonic()
        blocked: set[str] = set()
        while lane.is_open(now):
            group = next((name for name in lane.groups if name not in blocked), None)
            if group is None:
                return
            waiter = next(iter(lane.groups[group]))
            lane.groups.move_to_end(group)
            if waiter.granted.done():
                # It has ended, and has not run since.
                self._leave(waiter)
            elif all(each.is_open(now) for each in waiter.lanes):
                waiter.until = min(each.take(now) for each in waiter.lanes)
                self._leave(waiter)
                waiter.granted.set_result(None)
            else:
                blocked.add(group)

    # --- What a lane does while it is in use. ---

    def _serve(self, lane: LimitLane, *, wake: bool = True) -> None:
        if self._lanes.setdefault(lane.key, lane) is not lane:
            # It had ended, and another one has its place: two would lease slots in one name.
            return
        if lane.task is None or lane.task.done():
            lane.task = asyncio.ensure_future(self._run(lane))
        elif wake:
            lane.woken.set()

    async def _run(self, lane: LimitLane) -> None:
        """Ask for what a lane needs, until it is no longer in use and has given back what it had."""
        while True:
            lane.woken.clear()
            self._admit(lane)
            now = self._clock.monotonic()
            question, wait = (None, None) if self._is_stopped else lane.question(now)
            if question is not None:
                await self._renew(lane, question)
                self._refuse_late(lane)
                continue
            if wait is None:
                break
            await self._sleep(lane, wait)
        if self._lanes.get(lane.key) is lane:
            del self._lanes[lane.key]

    async def _sleep(self, lane: LimitLane, seconds: float) -> None:
        woken = asyncio.ensure_future(lane.woken.wait())
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait((woken, timer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
            timer.cancel()

    async def _renew(self, lane: LimitLane, question: Ask) -> None:
        """Ask, and take what the worker answers, unless the broker was stopped meanwhile."""
        try:
            share = await self._ask(question)
        except Exception:
            lane.not_answered(question, self._clock.monotonic())
            return
        if not self._is_stopped:
            lane.answered(question, share, self._clock.monotonic())

    def _refuse_late(self, lane: LimitLane) -> None:
        """Refuse the requests that would wait too long by what the worker answered."""
        self._admit(lane)
        now = self._clock.monotonic()
        for place, waiter in enumerate(tuple(lane.waiters()), start=1):
            expected = lane.delay(place, now)
            if now + expected > waiter.limit_at and not waiter.granted.done():
                self._leave(waiter)
                waiter.granted.set_exception(self._refusal(expected, waiter.place[1]))
