"""The store as the attempt API uses it: the incarnations of hosts, and their runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import Connection

from worker.clock import Clock
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import Offered
from worker.ids import RunId, WorkerId, new_id
from worker.runs.hosts import HostCaller, PoolLoad
from worker.runs.outcome import EndedAttempt
from worker.runs.placing import Ticket
from worker.runs.run import AdmittedRun, Isolation, OwnedRun
from worker.store import host_grants, host_handlers, hosts, placements, workers
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
        self._database = store.database
        self._lease = lease
        self._clock = clock
        self._walks: dict[WorkerId, RingWalk] = {}
        # Who else may run what, for all incarnations.
        self._serving: Sequence[host_grants.Serving] = ()
        self._serving_at = float("-inf")

    async def find(self, token_sha256: str, incarnation: str | None) -> HostCaller | None:
        """The host with this token, and whether the incarnation is one of its own."""
        return await self._database.call_autocommit(hosts.find, token_sha256, incarnation)

    async def begin(
        self, caller: HostCaller, *, capacity: Mapping[str, int], host: str, pid: int, version: str
    ) -> WorkerId:
        """Start an incarnation of a host, with a lease from now on."""
        worker = WorkerId(new_id())
        await self._database.call(
            hosts.begin,
            caller,
            worker,
            lease=self._lease,
            capacity=capacity,
            host=host,
            pid=pid,
            version=version,
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
        call = self._database.call if self._database.dialect == "sqlite" else self._database.call_autocommit
        return await call(work)

    async def unregister(self, worker: WorkerId) -> None:
        """End an incarnation; its runs are recovered."""
        await self._database.call(workers.unregister, worker)

    async def offer(self, worker: WorkerId, entries: Sequence[HandlerEntry]) -> None:
        """Add handlers to what an incarnation declares. Raises TooManyHandlers."""
        await self._database.call(host_handlers.report, worker, entries)

    async def offered(self, worker: WorkerId) -> Offered:
        """What an incarnation may do now with the handlers that it declares."""
        offered = await self._database.call_autocommit(host_grants.offered, worker)
        if not offered.conditional:
            return offered
        now = self._clock.monotonic()
        if now - self._serving_at > SERVING_AGE:
            self._serving = await self._database.call_autocommit(host_grants.serving)
            self._serving_at = now
        admitted = await self._database.call(host_grants.look, offered, self._serving)
        return replace(offered, admitted=admitted)

    async def owned(self, worker: WorkerId, fences: Mapping[RunId, int]) -> list[AdmittedRun]:
        """Of these runs those that the incarnation owns under these fencing tokens."""
        return await self._database.call_autocommit(hosts.owned, worker, fences)

    async def ended(self, worker: WorkerId, fences: Mapping[RunId, int]) -> set[tuple[RunId, int]]:
        """Of these attempts those whose end is stored already."""
        return await self._database.call_autocommit(hosts.ended, worker, fences)

    async def stops(self, worker: WorkerId, fences: Mapping[RunId, int]) -> Mapping[RunId, str]:
        """Of these runs of an incarnation those that are asked to stop, and why."""
        return await self._database.call_autocommit(hosts.stops, worker, fences)

    async def often_handed_back(self, run_ids: Sequence[RunId]) -> set[RunId]:
        """Of these running runs those that were handed back too often in a row, and stored nothing new."""
        return await self._database.call_autocommit(hosts.often_handed_back, run_ids)

    async def pool_load(self, pool: str) -> PoolLoad | None:
        """What waits in a pool now, and how full its hosts are; None if nothing is due."""
        return await self._database.call_autocommit(hosts.load, pool)

    async def admit(
        self, worker: WorkerId, pool: str, offered: Admit, free: Mapping[Isolation, int]
    ) -> list[AdmittedRun]:
        """Mark waiting runs of a pool running for an incarnation; see `RingWalk.admit`."""
        walk = self._walks.get(worker)
        if walk is None:
            walk = self._walks[worker] = RingWalk(self._database, worker, pools=(pool,))
        return await self._store.admit_by(walk, offered, free)

    async def take_ticket(self, worker: WorkerId, ticket: Ticket) -> AdmittedRun | None:
        """Move a placed run to an incarnation; None if the ticket is not valid for it."""
        fence = ticket.run_id, ticket.fencing_token
        return await self._database.call(placements.take, worker, *fence, ticket.sha256)

    async def finish(self, worker: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Write ended attempts of an incarnation; returns the runs whose attempt is stored as given."""
        return await self._store.finish_by(worker, ended)

    async def hand_back(self, worker: WorkerId, owned: Sequence[OwnedRun]) -> set[RunId]:
        """Let runs of an incarnation wait again."""
        return await self._database.call(workers.hand_back, worker, owned)

    def forget(self, worker: WorkerId) -> None:
        """Drop what is kept of an incarnation between calls."""
        self._walks.pop(worker, None)

    def keep(self, alive: Collection[WorkerId]) -> None:
        """Drop all incarnations but these."""
        for worker in self._walks.keys() - set(alive):
            del self._walks[worker]
