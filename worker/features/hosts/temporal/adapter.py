"""A placer that acts only on the database of its own installation."""

from __future__ import annotations

from worker.clock import Clock
from worker.errors import InstallationMismatch, Unavailable
from worker.features.hosts.temporal import EngineUnavailable, Placer, Standing
from worker.model.runs.hosts import Placement, Ticket
from worker.operations.installation import Ownership

# Seconds for which a placer may act after it has asked.
ASK_AGAIN = 1.0


class OwnedPlacer:
    """A placer that does nothing while the database may be a copy of another installation's.

    A copy has the same key and the same unfinished runs: it would withdraw the activities of the other one.
    To the loop the engine is unavailable meanwhile, so the pool's runs wait.
    """

    def __init__(self, placer: Placer, ownership: Ownership, clock: Clock) -> None:
        self._placer = placer
        self._ownership = ownership
        self._clock = clock
        self._checked_at = float("-inf")

    async def place(self, placement: Placement, ticket: Ticket) -> None:
        await self._require()
        await self._placer.place(placement, ticket)

    async def withdraw(self, placement: Placement) -> None:
        await self._require()
        await self._placer.withdraw(placement)

    async def describe(self, placement: Placement) -> Standing:
        await self._require()
        return await self._placer.describe(placement)

    async def check(self) -> None:
        await self._require()
        await self._placer.check()

    async def _require(self) -> None:
        """Raises EngineUnavailable; asks the database once a second at most, since a burst is many runs."""
        now = self._clock.monotonic()
        if now - self._checked_at < ASK_AGAIN:
            return
        try:
            await self._ownership.permit()
        except (InstallationMismatch, Unavailable) as error:
            raise EngineUnavailable(error.message, fix=error.fix) from error
        self._checked_at = now
