"""Step writer: stores the results of steps of all runs of this process in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.handlers.steps import StepError
from worker.ids import RunId
from worker.model.runs.run import AdmittedRun

# Maximum rows of one statement, and bytes of their results.
BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024
# Seconds between tries while the database is unavailable.
RETRY = 0.5


class BatchRow(Protocol):
    """A step of a running run: `size` are the bytes of its result, `what` is its name for people."""

    @property
    def run(self) -> AdmittedRun: ...
    @property
    def size(self) -> int: ...
    @property
    def what(self) -> str: ...


class StepsStore(Protocol):
    async def store_steps(self, rows: Sequence[Any]) -> set[tuple[RunId, int]]:
        """Store steps, fenced; returns the runs, with their fencing tokens, that still run."""


Waiting = tuple[BatchRow, "asyncio.Future[bool]"]


@dataclass(eq=False, repr=False)
class StepWriter:
    """Writes everything that arrived since the last write in one transaction; the callers wait for it."""

    store: StepsStore
    clock: Clock
    _pending: list[Waiting] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def store_step(self, step: BatchRow) -> bool:
        """Store a step; returns once it is durable, or False if the run is no longer ours.

        A cancelled caller does not stop the write: the call behind the result was made.
        """
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._pending.append((step, stored))
        self._wake.set()
        return await stored

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            batch = self._next_batch()
            if not self._pending:
                self._wake.clear()
            await self._write(batch)

    def _next_batch(self) -> list[Waiting]:
        count = size = 0
        for step, _ in self._pending[:BATCH]:
            size += step.size
            if count and size > BATCH_BYTES:
                break
            count += 1
        batch, self._pending = self._pending[:count], self._pending[count:]
        return batch

    async def _write(self, batch: Sequence[Waiting]) -> None:
        while True:
            try:
                ours = await self.store.store_steps([step for step, _ in batch])
                break
            except Unavailable:
                # They wait here. The answer to a commit may be lost: the store accepts the same step again.
                await self.clock.sleep(RETRY)
            except Exception as error:
                await self._write_each(batch, error)
                return
        for step, stored in batch:
            if not stored.done():
                stored.set_result((step.run.id, step.run.fencing_token) in ours)

    async def _write_each(self, batch: Sequence[Waiting], error: Exception) -> None:
        """Write the steps of a batch that the database rejects one by one, to find the one that is wrong."""
        if len(batch) > 1:
            for waiting in batch:
                await self._write([waiting])
            return
        step, stored = batch[0]
        if not isinstance(error, StepError):
            kind = type(error).__name__
            error = StepError(f"{step.what}: the database does not take its result ({kind})")
        if not stored.done():
            stored.set_exception(error)
