"""Limits as running attempts ask for them: of the worker's own broker, and of those of hosts."""

from __future__ import annotations

from dataclasses import dataclass

from worker.clock import Clock
from worker.features.egress.shares import Shares
from worker.handlers.calls import AskShare, KnownLimits
from worker.ids import OrgId, WorkerId
from worker.model.limits import LIFE, SLOT_LIFE, Ask, Share
from worker.model.orgs import OrgRef
from worker.store.database import Database

# Tokens a second of a limit that was removed.
PACE = 1e6


@dataclass(frozen=True, slots=True)
class SharedLimits:
    """Implements `engine.attempt.tools.LimitSource`."""

    shares: Shares
    clock: Clock

    async def limits_of(self, org_id: OrgId, origin: str) -> KnownLimits:
        """As `LimitSource.limits_of`."""
        self.shares.note_requests()
        found = tuple(limit for limit in await self.shares.limits() if limit.origin == origin)
        return KnownLimits(found, self.shares.paused_for(org_id, origin))

    async def share_of(self, org_id: OrgId, call: AskShare, *, host: str | None) -> Share:
        """As `LimitSource.share_of`; org and holder are those of the run, whatever its broker says."""
        limit = next((each for each in await self.shares.limits() if each.id == call.limit), None)
        if limit is None:  # it was removed: its requests go on
            return Share(call.want, call.slots, 0.0, pace=PACE, until=LIFE, slots_until=SLOT_LIFE)
        began = self.clock.monotonic()
        ask = Ask(limit.key(org_id), call.want, call.returned, call.granted_at, call.slots, call.in_use)
        share = await self.shares.share(ask, host)
        # The worker's clock means nothing to another machine. It asked later than `began`.
        return share._replace(until=share.until - began, slots_until=share.slots_until - began)

    async def pause_origin(self, org: OrgRef, origin: str, seconds: float) -> None:
        """As `LimitSource.pause_origin`."""
        await self.shares.pause(org.id, origin, seconds, org=org.code)

    async def close(self) -> None:
        """End the questions that are under way."""
        await self.shares.close()

    async def run(self) -> None:
        """Look at the pauses while there are requests or pauses, until cancelled. Raises Unavailable."""
        await self.shares.run()


def shared_limits(database: Database, worker_id: WorkerId, clock: Clock) -> SharedLimits:
    """The limits of one incarnation of a worker."""
    return SharedLimits(Shares(database, worker_id, clock), clock)
