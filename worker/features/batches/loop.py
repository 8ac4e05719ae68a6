"""The loop of a worker that sends the batches of its pools, each under a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Connection

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun
from worker.errors import Unavailable
from worker.features.batches.accounts import Accounts, Ledger
from worker.features.batches.advance import Advance, LeaseGone, Patience
from worker.features.batches.desk import Desk
from worker.features.batches.sealing import Sealer
from worker.ids import ALL_ORGS, WorkerId
from worker.model.batches import BatchLimits, ModelApi, PendingRequest, pooled
from worker.model.runs.waits import NewWait, WaitState
from worker.store import batch_requests, batches, budgets
from worker.store.batches import PoolLease
from worker.store.database import Database
from worker.store.dialect import Row, database_now
from worker.telemetry.events import emit

# Seconds between two looks at a pool.
EVERY = 1.0
# Batches of a pool that are advanced at the same time.
AT_ONCE = 8
# Seconds between two deletions of old batches, how many of them, and how old.
FORGET_EVERY = 60.0
FORGOTTEN = 1000
KEPT = timedelta(days=90)
# The part of a lease after which it is renewed, and after which nothing is sent under it.
RENEW = 0.3
TRUSTED = 0.8


@dataclass(eq=False)
class BatchSender:
    """Implements `engine.attempt.tools.Batches` for one incarnation of a worker."""

    database: Database
    worker_id: WorkerId
    clock: Clock
    pools: Sequence[str]
    lasts: timedelta
    desk: Desk
    accounts: Accounts
    sealer: Sealer
    ledger: Ledger
    known: Mapping[str, ModelApi]
    limits: Mapping[str, BatchLimits]
    polls: Mapping[str, float]
    on_woken: Callable[[], object]
    every: float = EVERY
    patience: Patience = field(default_factory=Patience)
    # Of each pool the lease, and the monotonic time after which it is not trusted.
    _held: dict[str, tuple[PoolLease, float]] = field(default_factory=dict)
    # Pools of which requests may have been settled since runs that wait for budgets were looked at.
    _settled: set[str] = field(default_factory=set)
    _forgotten: float = float("-inf")

    @property
    def apis(self) -> tuple[ModelApi, ...]:
        return tuple(self.known.values())

    def serves(self, pool: str) -> bool:
        """As `Batches.serves`."""
        return pool in self.pools

    async def open(self, inflight: InflightRun, wait: NewWait) -> WaitState | None:
        """As `Batches.open`."""
        return await self.desk.open(inflight, wait)

    async def run(self) -> None:
        """As `Batches.run`."""
        async with asyncio.TaskGroup() as tasks:
            for pool in self.pools:
                tasks.create_task(self._lease(pool))
                tasks.create_task(self._serve(pool))

    async def close(self) -> None:
        """As `Batches.close`."""
        await self.accounts.client.aclose()

    async def _lease(self, pool: str) -> None:
        """Hold the lease of a pool while no other worker does."""
        try:
            while True:
                began = self.clock.monotonic()
                with suppress(Unavailable):
                    lease = await self.database.call(batches.take_lease, pool, self.worker_id, self.lasts)
                    if lease is None:
                        self._held.pop(pool, None)
                    else:
                        before = self._held.get(pool)
                        if before is None or before[0].fencing_token != lease.fencing_token:
                            # The last holder may have settled requests, and died.
                            self._settled.add(pool)
                        self._held[pool] = lease, began + TRUSTED * self.lasts.total_seconds()
                await self.clock.sleep(RENEW * self.lasts.total_seconds())
        finally:
            if (held := self._held.pop(pool, None)) is not None:
                with suppress(Unavailable):
                    await asyncio.shield(self.database.call(batches.release_lease, held[0]))

    async def _serve(self, pool: str) -> None:
        while True:
            if pool in self._held:
                try:
                    await self.look(pool)
                except (LeaseGone, Unavailable):
                    pass
                except Exception as error:
                    emit("loop.failed", loop=f"batches {pool}", error=f"{type(error).__name__}: {error}")
            await self.clock.sleep(self.every)

    async def look(self, pool: str) -> None:
        """Pool what waits, and do what is next for each batch. Raises LeaseGone, Unavailable."""
        self._check(pool)
        while count := await self.database.call(batch_requests.fall_back_due, pool):
            emit("batch.fell_back", reason="deadline", requests=count)
            self.on_woken()
            self._settled.add(pool)
        while await self.database.call(batch_requests.end_orphans, pool):
            self._check(pool)
            self._settled.add(pool)
        if self.clock.monotonic() - self._forgotten > FORGET_EVERY:
            self._forgotten = self.clock.monotonic()
            await self.database.call(batches.forget_batches, KEPT, limit=FORGOTTEN)
        now, waiting = await self.database.call_autocommit(_pending, pool)
        for listed in pooled(waiting, self.limits, now):
            self._check(pool)
            await self.database.call(batches.make_batch, self._lease_of(pool), listed)
        rows = await self.database.call_autocommit(batches.due, pool)
        if rows:
            self._settled.add(pool)
        turns, advance = asyncio.Semaphore(AT_ONCE), self.advance(pool)

        async def one(row: Row) -> None:
            async with turns:
                self._check(pool)
                await advance.next(row)

        found = await asyncio.gather(*(one(row) for row in rows), return_exceptions=True)
        if pool in self._settled:
            if await self.database.call(budgets.wake_free, ALL_ORGS):
                self.on_woken()
            self._settled.discard(pool)
        for error in found:
            if isinstance(error, BaseException):
                raise error

    def advance(self, pool: str) -> Advance:
        """What advances the batches of a pool, under the lease that is held now and no later one."""
        lease = self._lease_of(pool)
        return Advance(
            self.database,
            self.accounts,
            self.sealer,
            self.ledger,
            self.known,
            self.polls,
            lease,
            partial(self._check, pool, lease),
            self.on_woken,
            self.patience,
        )

    def _lease_of(self, pool: str) -> PoolLease:
        if (held := self._held.get(pool)) is None:
            raise LeaseGone
        return held[0]

    def _check(self, pool: str, lease: PoolLease | None = None) -> None:
        """Raise LeaseGone if the lease may have expired: this process may have been frozen.

        With a `lease` also if it is not that one any more: another worker may have had the pool in between.
        """
        held = self._held.get(pool)
        if held is None or self.clock.monotonic() >= held[1]:
            raise LeaseGone
        if lease is not None and held[0].fencing_token != lease.fencing_token:
            raise LeaseGone


def _pending(connection: Connection, pool: str) -> tuple[datetime, list[PendingRequest]]:
    return database_now(connection), batches.pending(connection, pool)
