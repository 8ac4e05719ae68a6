"""The store as the attempt API uses it, for hosts and their runs, and as a placing loop does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection

from worker.clock import Clock
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import Offered
from worker.ids import RunId, WorkerId, new_id
from worker.model.runs.hosts import Fence, HostCaller, Placed, PoolRoom
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, Isolation, OwnedRun
from worker.store import host_grants, host_handlers, hosts, placements, workers
from worker.store.database import in_autocommit, in_transaction
from worker.store.ring_walk import RingWalk
from worker.store.sql import statements
from worker.store.worker_store import WorkerStore

# Seconds for which it is remembered who may run what.
SERVING_AGE = 5.0

T = TypeVar("T")
Admit = Mapping[str, int | None]


class HostStore:
    """What a worker does in the database for hosts. Budgets are those that `store`, its own, watches."""

    def __init__(self, store: WorkerStore, lease: timedelta, clock: Clock) -> None:
        self._store = store
        self.database = store.database
        self._lease = lease
        self._clock = clock
        self._walks: dict[WorkerId, RingWalk] = {}
        # Who else may run what, for all incarnations.
        self._serving: Sequence[host_grants.Serving] = ()
        self._serving_at = float("-inf")

    find = in_autocommit(hosts.find)
    owned = in_autocommit(hosts.owned)
    ended = in_autocommit(hosts.ended)
    stops = in_autocommit(hosts.stops)
    often_handed_back = in_autocommit(hosts.often_handed_back)
    pool_load = in_autocommit(hosts.load)
    unregister = in_transaction(workers.unregister)
    hand_back = in_transaction(workers.hand_back)
    take_ticket = in_transaction(placements.take)

    async def begin(
        self, caller: HostCaller, *, capacity: Mapping[str, int], host: str, pid: int, version: str
    ) -> WorkerId:
        """Start an incarnation of a host, with a lease from now on."""
        worker = WorkerId(new_id())
        identity: dict[str, Any] = {"capacity": capacity, "host": host, "pid": pid, "version": version}
        await self.database.call(
            lambda connection: hosts.begin(connection, caller, worker, lease=self._lease, **identity)
        )
        return worker

    async def renew(self, worker: WorkerId) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease and return the runs it covers; False if the incarnation was ended."""
        return await self._renewing(
            lambda connection: statements(connection).renew(connection, worker, self._lease)
        )

    async def renew_as_json(self, worker: WorkerId) -> tuple[bool, str]:
        """The same with the runs as JSON, for an answer that nothing here looks at."""
        return await self._renewing(
            lambda connection: statements(connection).renew_as_json(connection, worker, self._lease)
        )

    async def _renewing(self, work: Callable[[Connection], T]) -> T:
        # On PostgreSQL it is one statement, which is its own transaction.
        call = self.database.call if self.database.dialect == "sqlite" else self.database.call_autocommit
        return await call(work)

    async def offer(self, worker: WorkerId, entries: Sequence[HandlerEntry]) -> None:
        """Add handlers to what an incarnation declares. Raises TooManyHandlers."""
        await self.database.call(host_handlers.report, worker, entries)

    async def offered(self, worker: WorkerId) -> Offered:
        """What an incarnation may do now with the handlers that it declares."""
        offered = await self.database.call_autocommit(host_grants.offered, worker)
        if not offered.conditional:
            return offered
        now = self._clock.monotonic()
        if now - self._serving_at > SERVING_AGE:
            self._serving = await self.database.call_autocommit(host_grants.serving)
            self._serving_at = now
        admitted = await self.database.call(host_grants.look, offered, self._serving)
        return replace(offered, admitted=admitted)

    async def admit(
        self, worker: WorkerId, pool: str, offered: Admit, free: Mapping[Isolation, int]
    ) -> list[AdmittedRun]:
        """Mark waiting runs of a pool running for an incarnation; see `RingWalk.admit`."""
        walk = self._walks.get(worker)
        if walk is None:
            walk = self._walks[worker] = RingWalk(self.database, worker, pools=(pool,))
        return await self._store.admit_by(walk, offered, free)

    async def finish(self, worker: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Write ended attempts of an incarnation; returns the runs whose attempt is stored as given."""
        return await self._store.finish_by(worker, ended)

    def forget(self, worker: WorkerId) -> None:
        """Drop what is kept of an incarnation between calls."""
        self._walks.pop(worker, None)

    def keep(self, alive: Collection[WorkerId]) -> None:
        """Drop all incarnations but these."""
        for worker in self._walks.keys() - set(alive):
            del self._walks[worker]


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
