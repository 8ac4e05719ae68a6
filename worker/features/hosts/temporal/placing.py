"""Placing: waiting runs of a pool → running, offered to its hosts by an engine until one takes each."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice

from worker.clock import Clock
from worker.engine.signals import wait_for
from worker.errors import Unavailable
from worker.features.hosts.temporal import EngineUnavailable, Placer
from worker.model.runs.hosts import Fence, Placement, PoolRoom, Ticket
from worker.model.runs.run import OwnedRun
from worker.store.host_store import PlacingStore
from worker.telemetry.events import emit

# Requests to the engine at a time.
AT_ONCE = 32
# Seconds between two looks at what was placed.
TEND = 0.2
# Age from which the engine is asked what became of a placement, and how many in one turn.
LOOK_AFTER = timedelta(seconds=2)
LOOKED_AT = 20
# Pause of a run that no host took.
PAUSE = timedelta(seconds=2)
# Seconds between two tries to reach an engine that does not respond, at first and at most.
TRY_AGAIN = 1.0
LONGEST_TRY = 15.0
# Seconds for taking back what no host has taken, when the worker stops.
LEAVE = 3.0


@dataclass(eq=False, repr=False)
class Placing:
    """Places the runs of one pool; several workers may do so for the same pool.

    A placed run is this worker's until a host takes it, but no process of this worker runs it: `holds` tells
    the reconciler. What no host takes within `place_timeout` waits again, and so does everything when this
    loop ends.
    """

    store: PlacingStore
    placer: Placer
    pool: str
    clock: Clock
    poll: float
    place_timeout: timedelta
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    _held: dict[Fence, Placement] = field(default_factory=dict)
    _at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    _tended_at: float = float("-inf")
    # While the engine does not respond: what it said, since when, when to try again, and the pause then.
    _error: str | None = None
    _lost_at: float = 0.0
    _try_at: float = 0.0
    _pause: float = TRY_AGAIN

    def holds(self, run: OwnedRun) -> bool:
        """Whether this is a run on its way to a host."""
        return (run.id, run.fencing_token) in self._held

    async def run(self) -> None:
        """Place runs until cancelled, then withdraw those that no host has taken."""
        try:
            while True:
                self.wake.clear()
                placed = 0
                with suppress(Unavailable):
                    placed = await self.turn()
                if not placed:
                    await wait_for(self.wake, self.poll)
        finally:
            # What stays in the engine is not valid any more.
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(LEAVE):
                    await self._withdraw(list(self._held), "the worker that placed it stopped", timedelta())

    async def turn(self) -> int:
        """Withdraw what is overdue, then place what there is room for; returns how many were placed."""
        now = self.clock.monotonic()
        if self._held and now - self._tended_at >= TEND:
            self._tended_at = now
            await self._tend()
        if self._error is not None and not await self._is_back():
            return 0
        room = await self.store.room()
        if room.is_empty:
            return 0
        placing = asyncio.create_task(self._place(room))
        try:
            # Shielded: a run between admission and its ticket would wait for two renewals.
            return await asyncio.shield(placing)
        except asyncio.CancelledError:
            await asyncio.wait({placing})
            raise

    async def _place(self, room: PoolRoom) -> int:
        runs = await self.store.admit(room)
        if not runs:
            return 0
        placements = [Placement.of(run) for run in runs]
        tickets = {each.fence: Ticket.new(each.run_id, each.fencing_token) for each in placements}
        # From here on the reconciler leaves them alone; if the answer is lost, it hands them back.
        self._held |= {each.fence: each for each in placements}
        try:
            ours = await self.store.place({fence: ticket.sha256 for fence, ticket in tickets.items()})
        except Unavailable:
            self._forget(tickets)
            raise
        self._forget(tickets.keys() - ours)
        offers = [self._offer(each, tickets[each.fence]) for each in placements if each.fence in ours]
        failed = [fence for fence in await asyncio.gather(*offers) if fence is not None]
        if failed:
            await self._withdraw(failed, self._error or "", timedelta())
        if placed := len(offers) - len(failed):
            emit("runs.placed", pool=self.pool, count=placed)
        return placed

    async def _offer(self, placement: Placement, ticket: Ticket) -> Fence | None:
        """Offer a run; returns its fence if that failed."""
        async with self._at_once:
            if self._error is not None:
                return placement.fence
            try:
                await self.placer.place(placement, ticket)
            except EngineUnavailable as error:
                self._lose(error)
                return placement.fence
        return None

    async def _tend(self) -> None:
        """Forget what was taken, and withdraw what was cancelled, is overdue or has left the engine."""
        placed = await self.store.placed()
        untaken = {each.placement.fence for each in placed}
        self._forget(self._held.keys() - untaken)
        mine = [each for each in placed if each.placement.fence in self._held]
        cancelled = [each.placement.fence for each in mine if each.cancel_requested]
        overdue = [each.placement.fence for each in mine if each.age >= self.place_timeout]
        known = {*cancelled, *overdue}
        old = (each for each in mine if each.age >= LOOK_AFTER and each.placement.fence not in known)
        looks = [self._is_gone(each.placement) for each in islice(old, LOOKED_AT)]
        gone = [fence for fence in await asyncio.gather(*looks) if fence is not None]
        seconds = f"{self.place_timeout.total_seconds():g}"
        await self._withdraw(cancelled, "its cancellation was requested", timedelta())
        await self._withdraw(overdue, f"no host took it within {seconds} s", PAUSE)
        await self._withdraw(gone, "its activity ended before a host took it", PAUSE)

    async def _is_gone(self, placement: Placement) -> Fence | None:
        async with self._at_once:
            with suppress(EngineUnavailable):
                if self._error is None and await self.placer.describe(placement) == "gone":
                    return placement.fence
        return None

    async def _withdraw(self, fences: Sequence[Fence], detail: str, after: timedelta) -> None:
        """First in the database, which decides, then in the engine."""
        if not fences:
            return
        ours = await self.store.withdraw(fences, detail, after)
        withdrawn = [self._held[fence] for fence in fences if fence in ours]
        self._forget(fences)
        if withdrawn:
            emit("runs.unplaced", pool=self.pool, count=len(withdrawn), detail=detail)
        await asyncio.gather(*(self._take_back(each) for each in withdrawn))

    async def _take_back(self, placement: Placement) -> None:
        # A ticket that stays there is not valid any more.
        async with self._at_once:
            if self._error is None:
                with suppress(EngineUnavailable):
                    await self.placer.withdraw(placement)

    def _forget(self, fences: Collection[Fence]) -> None:
        for fence in list(fences):
            self._held.pop(fence, None)

    def _lose(self, error: EngineUnavailable) -> None:
        if self._error is None:
            self._error, self._lost_at, self._pause = error.message, self.clock.monotonic(), TRY_AGAIN
            self._try_at = self._lost_at + self._pause
            emit("engine.lost", pool=self.pool, error=error.message)

    async def _is_back(self) -> bool:
        now = self.clock.monotonic()
        if now < self._try_at:
            return False
        try:
            await self.placer.check()
        except EngineUnavailable as error:
            self._error = error.message
            self._pause = min(self._pause * 2, LONGEST_TRY)
            self._try_at = self.clock.monotonic() + self._pause
            await self.store.mark(error.message)
            return False
        self._error = None
        emit("engine.back", pool=self.pool, seconds=round(now - self._lost_at, 1))
        while await self.store.mark(None):
            pass
        return True
