"""Orgs whose properties were changed through orgworker: tokens from before have old claims."""

from __future__ import annotations

from collections import OrderedDict
from datetime import timedelta

from worker.bounded import remember
from worker.clock import Clock
from worker.ids import ALL_ORGS, OrgId, new_id_at
from worker.store import audit
from worker.store.database import Database

# Seconds between two looks of a worker.
EVERY = 2.0
# A change is found although clocks differ by so much, or its transaction took so long.
LATE = timedelta(seconds=60)
MAX_CHANGES = 10_000


class NewClaims:
    """Finds each change of an org's properties once, by its row in the audit."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._seen: OrderedDict[str, None] = OrderedDict()

    async def look(self) -> set[OrgId]:
        """The orgs with changes that no earlier call returned. Raises StoreUnavailable."""
        since = new_id_at(self._clock.now() - LATE)
        rows = await self._database.call_autocommit(audit.property_changes, ALL_ORGS, since)
        new = [(change, org_id) for change, org_id in rows if change not in self._seen]
        for change, _ in new:
            remember(self._seen, change, None, MAX_CHANGES)
        return {org_id for _, org_id in new}
