"""The placing loops of a worker: one for each pool whose runs Temporal places on hosts."""

from __future__ import annotations

from worker.clock import Clock
from worker.errors import InstallationMismatch, Unavailable
from worker.features.hosts.temporal import EngineUnavailable, Placer, Standing
from worker.features.hosts.temporal.connection import require_client, tls_of
from worker.features.hosts.temporal.placing import Placing
from worker.ids import WorkerId
from worker.model.runs.hosts import Placement, Ticket
from worker.operations.installation import Ownership
from worker.settings import Settings
from worker.store.host_store import PlacingStore
from worker.store.worker_store import WorkerStore

# Seconds for which a placer may act after it has asked.
ASK_AGAIN = 1.0


def check_placers(settings: Settings) -> None:
    """Raise ConfigurationError if a pool needs Temporal, and its client or a file is missing."""
    if not settings.placed_by_temporal:
        return
    require_client(f"pools.{settings.placed_by_temporal[0]}.placer is temporal")
    tls_of(settings.temporal, tls=settings.temporal.tls)


def placing_loops(
    settings: Settings, store: WorkerStore, worker_id: WorkerId, ownership: Ownership, clock: Clock
) -> dict[str, Placing]:
    """The loops by pool; none if no pool has the placer temporal. `ownership` has the database's key."""
    pools = settings.placed_by_temporal
    if not pools:
        return {}
    # Only here: it takes time and memory that other workers need not spend.
    from worker.features.hosts.temporal.placer import TemporalPlacer

    temporal = settings.temporal
    placer = TemporalPlacer(
        temporal.address,
        temporal.namespace,
        installation=ownership.key or "",
        place_timeout=temporal.place_timeout,
        identity=f"orgworker {worker_id}",
        tls=tls_of(temporal, tls=temporal.tls),
    )
    owned = OwnedPlacer(placer, ownership, clock)
    return {
        pool: Placing(
            PlacingStore(store, worker_id, pool),
            owned,
            pool,
            clock,
            poll=settings.execution.poll.total_seconds(),
            place_timeout=temporal.place_timeout,
        )
        for pool in pools
    }


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
