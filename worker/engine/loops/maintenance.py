"""Maintenance: the periodic chores, ticked by APScheduler: sweeps, retention and failure counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun
from worker.errors import Unavailable
from worker.ids import DefinitionId, OrgId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import Recovered, Swept
from worker.telemetry.events import emit

Chore = Callable[[], Awaitable[None]]
# Seconds after a drain began for which a worker waits for chores that have begun.
LAST_CHORES = 2.0


class Housekeeping:
    """Runs each chore at its interval, one at a time; reports and retries one that fails."""

    def __init__(self) -> None:
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        self._begun: set[asyncio.Task[Any]] = set()
        self._until = 0.0
        # It logs a warning for each tick while a chore still runs, as during an outage of the database.
        logging.getLogger("apscheduler.scheduler").setLevel(logging.ERROR)

    def every(self, seconds: float, name: str, chore: Chore) -> None:
        """Add a chore; ticks while it still runs are skipped."""

        async def tick() -> None:
            if (task := asyncio.current_task()) is not None:
                self._begun.add(task)
                task.add_done_callback(self._begun.discard)
            try:
                await chore()
            except (Unavailable, asyncio.CancelledError):
                # The scheduler would log a cancellation, which only a shutdown causes, as an error.
                return
            except Exception as error:
                emit("loop.failed", loop=name, error=type(error).__name__)

        self._scheduler.add_job(
            tick,
            IntervalTrigger(seconds=seconds),
            id=name,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )

    def start(self) -> None:
        self._scheduler.start()

    def pause(self) -> None:
        """Begin no more chores."""
        self._scheduler.pause()
        self._until = asyncio.get_running_loop().time() + LAST_CHORES

    async def finish(self) -> None:
        """Let chores end that have begun, for `LAST_CHORES`: they report a change once it is stored."""
        if self._begun:
            left = self._until - asyncio.get_running_loop().time()
            await asyncio.wait(self._begun, timeout=max(0.0, left))

    def stop(self) -> None:
        """Cancel those that still run."""
        self._scheduler.shutdown(wait=False)


class SweepStore(Protocol):
    async def sweep(self) -> Sequence[Swept]:
        """Promote, expire and mark waiting runs; return those that ended by it."""


async def sweep(store: SweepStore) -> None:
    for swept in await store.sweep():
        emit(
            "run.changed",
            org=swept.org,
            run=swept.run_id,
            definition=swept.definition,
            attempt=swept.attempt,
            state=swept.state,
            reason=swept.reason,
        )


# Rows deleted by one transaction: runs or skips; and log lines or attempts, which are small and many.
BATCH = 500
PARTS = 5_000
# Seconds between two batches, so that runs get the database's threads.
PAUSE = 0.05
# A worker's row says where and how an attempt ran.
WORKERS = timedelta(days=7)


class RetentionStore(Protocol):
    """Each deletes at most `limit` rows of a table that are older than `age`, and returns their number.

    `forget_parts` deletes log lines, attempts and spends of the `runs` that `forget_runs` deletes next,
    `forget_starts` the keys of starts whose run was made,
    `forget_trees` the runs below them,
    `forget_counters` those of periods that no budget compares any more, `forget_shares` those of limits that
    no worker uses, `forget_late` definitions whose late run is deleted.
    """

    async def forget_parts(self, state: str, age: timedelta, *, runs: int, limit: int) -> int: ...
    async def forget_trees(self, state: str, age: timedelta, *, runs: int, limit: int) -> int: ...
    async def forget_runs(self, state: str, age: timedelta, *, limit: int) -> int: ...
    async def forget_skips(self, age: timedelta, *, limit: int) -> int: ...
    async def forget_late(self, age: timedelta, *, limit: int) -> int: ...
    async def forget_logs(self, age: timedelta, *, limit: int) -> int: ...
    async def forget_starts(self, age: timedelta, *, limit: int) -> int: ...
    async def forget_workers(self, age: timedelta) -> int: ...
    async def forget_counters(self) -> int: ...
    async def forget_shares(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Ages:
    """How long rows are kept: runs by their final state, skips, log lines, and keys of starts."""

    runs: Mapping[str, timedelta]
    skips: timedelta
    logs: timedelta
    start_keys: timedelta
    workers: timedelta = WORKERS


@dataclass(eq=False, repr=False)
class Retention:
    """Deletes runs with everything that belongs to them, skips and log lines, each at its age.

    Several workers may do so at once, as a batch skips locked rows. The rollups stay.
    """

    store: RetentionStore
    ages: Ages
    clock: Clock

    async def tidy(self) -> None:
        """Delete everything that is old enough. Raises Unavailable; the next call continues."""
        store, ages = self.store, self.ages
        runs = 0
        for state, age in ages.runs.items():
            runs += await self._in_batches(partial(self._forget_runs, state, age), BATCH)
        skips = await self._in_batches(partial(store.forget_skips, ages.skips), BATCH)
        await self._in_batches(partial(store.forget_late, ages.runs["failed"]), BATCH)
        lines = await self._in_batches(partial(store.forget_logs, ages.logs), PARTS)
        keys = await self._in_batches(partial(store.forget_starts, ages.start_keys), PARTS)
        workers = await store.forget_workers(ages.workers)
        await store.forget_counters()
        await store.forget_shares()
        if runs or skips or lines or keys or workers:
            emit("history.forgotten", runs=runs, skips=skips, lines=lines, keys=keys, workers=workers)

    async def _forget_runs(self, state: str, age: timedelta, *, limit: int) -> int:
        # Parts first, in their own batches, so that no transaction is long.
        await self._in_batches(partial(self.store.forget_trees, state, age, runs=limit), BATCH)
        await self._in_batches(partial(self.store.forget_parts, state, age, runs=limit), PARTS)
        return await self.store.forget_runs(state, age, limit=limit)

    async def _in_batches(self, forget: Callable[..., Awaitable[int]], limit: int) -> int:
        total = 0
        while True:
            batch = await forget(limit=limit)
            total += batch
            if batch < limit:
                return total
            await self.clock.sleep(PAUSE)


Key = tuple[OrgId, DefinitionId]

# Final states that say whether a definition works; cancelled and skipped runs say nothing about it.
COUNTED = frozenset({"succeeded", "failed", "refused"})
# Definitions that are known to have no failures; the set is cleared when it is full.
MAX_HEALTHY = 100_000


class FailureWatch:
    """Collects the definitions whose failures must be counted, for those with `pause_after_failures`."""

    def __init__(self) -> None:
        self._uncounted: set[Key] = set()
        self._healthy: set[Key] = set()

    def ended(self, ended: EndedAttempt, inflight: InflightRun | None) -> None:
        if inflight is None or inflight.plan is None or inflight.run.origin in ("backfill", "child"):
            return
        if inflight.plan.definition.pause_after_failures is None or ended.state not in COUNTED:
            return
        key = (ended.org_id, ended.definition_id)
        if ended.state != "succeeded" or key not in self._healthy:
            self._uncounted.add(key)

    def recovered(self, recovered: Sequence[Recovered]) -> None:
        self.put_back((run.org_id, run.definition_id) for run in recovered if run.state == "failed")

    def take(self) -> list[Key]:
        """The definitions to count now; removed here."""
        taken, self._uncounted = sorted(self._uncounted), set()
        return taken

    def put_back(self, keys: Iterable[Key]) -> None:
        """Add definitions again that could not be counted."""
        self._uncounted.update(keys)

    def counted(self, key: Key, failures: int) -> None:
        """Set a definition's number of failures; without any, its successes are not counted."""
        if failures:
            self._healthy.discard(key)
            return
        if len(self._healthy) >= MAX_HEALTHY:
            self._healthy.clear()
        self._healthy.add(key)

    def forget_sound(self) -> None:
        """Count the next success of each definition: another worker may have seen failures meanwhile."""
        self._healthy.clear()
