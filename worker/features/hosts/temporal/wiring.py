"""The placing loops of a worker: one for each pool whose runs Temporal places on hosts."""

from __future__ import annotations

from worker.clock import Clock
from worker.features.hosts.temporal.adapter import OwnedPlacer
from worker.features.hosts.temporal.connection import require_client, tls_of
from worker.features.hosts.temporal.placing import Placing
from worker.ids import WorkerId
from worker.operations.installation import Ownership
from worker.settings import Settings
from worker.store.host_store import PlacingStore
from worker.store.worker_store import WorkerStore


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
