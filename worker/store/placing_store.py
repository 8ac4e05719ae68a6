"""The store as a placing loop uses it: one worker's placements in one pool."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta

from worker.ids import WorkerId
from worker.runs.placing import Fence, Placed, PoolRoom
from worker.runs.run import AdmittedRun
from worker.store import placements
from worker.store.ring_walk import RingWalk
from worker.store.worker_store import WorkerStore


class PlacingStore:
    """Runs are owned by `worker_id` until a host takes them. The methods run in the database's threads."""

    def __init__(self, store: WorkerStore, worker_id: WorkerId, pool: str) -> None:
        self._store = store
        self._database = store.database
        self._worker_id = worker_id
        self._pool = pool
        self._walk = RingWalk(store.database, worker_id, pools=(pool,), placing=True)

    async def room(self) -> PoolRoom:
        """What the pool's hosts could take now."""
        return await self._database.call(placements.room_of, self._pool)

    async def admit(self, room: PoolRoom) -> Sequence[AdmittedRun]:
        """Mark waiting runs running for the pool's hosts, within their room and every other limit."""
        return await self._store.admit_by(self._walk, room.handlers, room.free)

    async def place(self, tickets: Mapping[Fence, str]) -> set[Fence]:
        """Store the hashes of tickets; returns the runs that are still this worker's."""
        return await self._database.call(placements.place, self._worker_id, self._pool, tickets)

    async def withdraw(self, fences: Collection[Fence], detail: str, after: timedelta) -> set[Fence]:
        """Let runs that no host has taken wait again after a pause; returns those that waited for a host."""
        return await self._database.call(
            placements.withdraw, self._worker_id, fences, detail=detail, after=after
        )

    async def placed(self) -> Sequence[Placed]:
        """What no host has taken yet."""
        return await self._database.call(placements.placed_by, self._worker_id, self._pool)

    async def mark(self, detail: str | None) -> int:
        """Set the reason of the pool's due runs to `unplaced`, or clear it; some at each call."""
        return await self._database.call(placements.mark, self._pool, detail)
