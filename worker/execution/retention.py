"""Retention: what ended long ago is deleted, in batches that no run has to wait for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

from worker.clock import Clock
from worker.telemetry.events import emit

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
