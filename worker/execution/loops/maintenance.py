"""Maintenance: the periodic chores, ticked by APScheduler: sweeps, retention and failure counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.attempts.inflight import InflightRun
from worker.ids import DefinitionId, OrgId, RunId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import Recovered
from worker.telemetry.events import emit

Chore = Callable[[], Awaitable[None]]


class Housekeeping:
    """Runs each chore at its interval, one at a time; one that fails is told and tried again."""

    def __init__(self) -> None:
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        # It warns at each tick that a chore still runs, which is what happens while the database is away.
        logging.getLogger("apscheduler.scheduler").setLevel(logging.ERROR)

    def every(self, seconds: float, name: str, chore: Chore) -> None:
        """Add a chore; a tick that comes while it still runs is left out."""

        async def tick() -> None:
            try:
                await chore()
            except (Unavailable, asyncio.CancelledError):
                # Cancelled it is at the end only; the scheduler would call that an error.
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

    def stop(self) -> None:
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)


class Names(Protocol):
    """What people call a run's org and definition, as far as their rows are there."""

    @property
    def org(self) -> str | None: ...
    @property
    def definition(self) -> str | None: ...


class Swept(Protocol):
    """A run that ended without having started."""

    @property
    def run_id(self) -> RunId: ...
    @property
    def names(self) -> Names: ...
    @property
    def attempt(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


class SweepStore(Protocol):
    async def sweep(self) -> Sequence[Swept]:
        """Promote, expire and mark; give the runs that ended by it."""
        ...


async def sweep(store: SweepStore) -> None:
    """Sweep once, and tell of each run that ended by it."""
    for swept in await store.sweep():
        emit(
            "run.changed",
            org=swept.names.org,
            run=swept.run_id,
            definition=swept.names.definition,
            attempt=swept.attempt,
            state=swept.state,
            reason=swept.reason,
        )


# Rows deleted by one transaction: runs or skips; and lines or attempts, which are small and many.
BATCH = 500
PARTS = 5_000
# Seconds between two batches: the database's threads belong to the runs.
PAUSE = 0.05
# A worker's row says where and how an attempt ran; it is kept as long as somebody may ask.
WORKERS = timedelta(days=7)


class RetentionStore(Protocol):
    """Each deletes what is older than an age, at most `limit` rows of a table, and says how many.

    `forget_parts` deletes lines and attempts of the `runs` that `forget_runs` takes next.
    """

    async def forget_parts(self, state: str, age: timedelta, *, runs: int, limit: int) -> int: ...
    async def forget_runs(self, state: str, age: timedelta, *, limit: int) -> int: ...
    async def forget_skips(self, age: timedelta, *, limit: int) -> int: ...
    async def forget_logs(self, age: timedelta, *, limit: int) -> int: ...
    async def forget_workers(self, age: timedelta) -> int: ...


@dataclass(frozen=True, slots=True)
class Ages:
    """How long things are kept: runs by their final state, skips, lines of logs."""

    runs: Mapping[str, timedelta]
    skips: timedelta
    logs: timedelta
    workers: timedelta = WORKERS


class Retention:
    """Deletes runs with all that belongs to them, skips and lines of logs, each at its age.

    Several workers may do so at once: a batch passes over the rows of another. Sums
    (`rollup_days`, `rollup_hours`) stay.
    """

    def __init__(self, store: RetentionStore, ages: Ages, clock: Clock) -> None:
        self._store = store
        self._ages = ages
        self._clock = clock

    async def tidy(self) -> None:
        """Delete all that is old enough by now.

        Raises:
            Unavailable: the database did not answer; the next call goes on from there.
        """
        store, ages = self._store, self._ages
        runs = 0
        for state, age in ages.runs.items():
            runs += await self._all(partial(self._forget_runs, state, age), BATCH)
        skips = await self._all(partial(store.forget_skips, ages.skips), BATCH)
        lines = await self._all(partial(store.forget_logs, ages.logs), PARTS)
        workers = await store.forget_workers(ages.workers)
        if runs or skips or lines or workers:
            emit("history.forgotten", runs=runs, skips=skips, lines=lines, workers=workers)

    async def _forget_runs(self, state: str, age: timedelta, *, limit: int) -> int:
        # What goes with a run goes first where it is much: no transaction is long.
        await self._all(partial(self._store.forget_parts, state, age, runs=limit), PARTS)
        return await self._store.forget_runs(state, age, limit=limit)

    async def _all(self, forget: Callable[..., Awaitable[int]], limit: int) -> int:
        total = 0
        while True:
            batch = await forget(limit=limit)
            total += batch
            if batch < limit:
                return total
            await self._clock.sleep(PAUSE)


Key = tuple[OrgId, DefinitionId]

# Ends that say whether a definition works; a cancelled or skipped run says nothing of it.
TELLING = frozenset({"succeeded", "failed", "refused"})
# Definitions that are known to have no failures; the set begins anew when it is full.
BOUND = 100_000


class FailureWatch:
    """Costs nothing where a definition does not ask for it, nor while its runs succeed."""

    def __init__(self) -> None:
        self._uncounted: set[Key] = set()
        self._sound: set[Key] = set()

    def ended(self, ended: EndedAttempt, held: InflightRun | None) -> None:
        """Take note of an end that is written."""
        plan = None if held is None else held.plan
        if plan is None or plan.definition.pause_after_failures is None or ended.state not in TELLING:
            return
        if held is not None and held.run.origin == "backfill":
            return
        key = (ended.org_id, ended.definition_id)
        if ended.state == "succeeded" and key in self._sound:
            return
        self._uncounted.add(key)

    def recovered(self, recovered: Sequence[Recovered]) -> None:
        """Take note of runs that failed because their worker was lost too often."""
        self.put_back((run.org_id, run.definition_id) for run in recovered if run.state == "failed")

    def take(self) -> list[Key]:
        """Those to count now; they are forgotten here."""
        taken, self._uncounted = sorted(self._uncounted), set()
        return taken

    def put_back(self, keys: Iterable[Key]) -> None:
        """Remember some again that could not be counted."""
        self._uncounted.update(keys)

    def counted(self, key: Key, failures: int) -> None:
        """A definition has so many failures: none, then its successes need not be counted."""
        if failures:
            self._sound.discard(key)
            return
        if len(self._sound) >= BOUND:
            self._sound.clear()
        self._sound.add(key)

    def forget_sound(self) -> None:
        """Count each definition's next success again: another worker may have seen failures meanwhile."""
        self._sound.clear()
