"""Finisher: writes the ends of attempts in batches, and loses none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun, Isolation
from worker.telemetry.events import emit

# Maximum rows of one statement: on a slow disk a commit is expensive, and more ends share it.
BATCH = 2000
# While admitted runs queue for their start, ends are collected: this number, or for this many seconds.
# A run costs worker and database less in a larger batch.
WORTHWHILE, COLLECT = 500, 0.05
# Seconds between tries while the database is unavailable.
RETRY = 0.5


class FinishStore(Protocol):
    async def finish(self, ended: Sequence[EndedAttempt]) -> set[RunId]:
        """Write the ends, fenced; return the runs whose row contains what we wrote."""


class RefillStore(Protocol):
    async def finish_and_admit(
        self,
        ended: Sequence[EndedAttempt],
        offered: Mapping[str, int | None],
        free: Mapping[Isolation, int],
    ) -> tuple[set[RunId], list[AdmittedRun]]:
        """As `FinishStore.finish`, and the runs that were admitted in the same transaction."""


class Refill(Protocol):
    """Admits runs to the slots that ends free, in the transaction that writes these ends."""

    def begin(
        self, ended: Sequence[EndedAttempt]
    ) -> tuple[Mapping[str, int | None], Mapping[Isolation, int]]:
        """The offered handlers, and the slots to fill. Without slots neither `end` nor a start follows."""

    def end(self, admitted: Sequence[AdmittedRun]) -> None:
        """Start what was admitted, once the ends have freed their slots."""


@dataclass(eq=False, repr=False)
class Finisher:
    """Writes everything that ended since the last write in one statement.

    `on_written` gets each end, and whether it was accepted: not if another incarnation owns the run.
    `on_unstorable` gets an end that the database rejects, and the error. `starting`: whether more ends
    are likely at once, since runs are just being started.
    """

    store: FinishStore
    clock: Clock
    on_written: Callable[[EndedAttempt, bool], None]
    on_unstorable: Callable[[EndedAttempt, Exception], None]
    starting: Callable[[], bool] = lambda: False
    _refill: tuple[Refill, RefillStore] | None = None
    _pending: list[EndedAttempt] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def refill_with(self, refill: Refill, store: RefillStore) -> None:
        """Admit runs to the slots that ends free as these are written, for a store where that is faster."""
        self._refill = (refill, store)

    def put(self, ended: EndedAttempt) -> None:
        if not self._pending:
            self._idle.clear()
            self._wake.set()
        self._pending.append(ended)

    async def flushed(self) -> None:
        """Wait until everything taken so far is written."""
        await self._idle.wait()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            await self._collect()
            batch, self._pending = self._pending[:BATCH], self._pending[BATCH:]
            if not self._pending:
                self._wake.clear()
            await self._write(batch)
            if not self._pending:
                self._idle.set()

    async def _collect(self) -> None:
        until = self.clock.monotonic() + COLLECT
        while self.starting() and len(self._pending) < WORTHWHILE and self.clock.monotonic() < until:
            await self.clock.sleep(0)  # meanwhile the loop starts more of them

    async def _write(self, batch: list[EndedAttempt]) -> None:
        while True:
            if self._refill is not None and await self._refilled(*self._refill, batch):
                return
            try:
                accepted = await self.store.finish(batch)
            except Unavailable:
                # The ends wait here; the next renewal says which runs are still ours.
                await self.clock.sleep(RETRY)
                continue
            except Exception as error:
                if len(batch) > 1:
                    for ended in batch:
                        await self._write([ended])
                    return
                if batch[0].reason == "result_unstorable":
                    emit("loop.failed", loop="finisher", error=type(error).__name__)
                    await self.clock.sleep(RETRY)
                self.on_unstorable(batch[0], error)
                batch = [unstorable(batch[0], error)]
                continue
            self._report(batch, accepted)
            return

    async def _refilled(self, refill: Refill, store: RefillStore, batch: list[EndedAttempt]) -> bool:
        """Write the batch and fill its slots; False if nothing was written."""
        offered, free = refill.begin(batch)
        if not any(free.values()):
            return False
        admitted: list[AdmittedRun] = []
        try:
            try:
                accepted, admitted = await store.finish_and_admit(batch, offered, free)
            except Exception:
                return False  # `finish` alone says why
            self._report(batch, accepted)
            return True
        finally:
            refill.end(admitted)

    def _report(self, batch: list[EndedAttempt], accepted: set[RunId]) -> None:
        for ended in batch:
            self.on_written(ended, ended.run_id in accepted)


def unstorable(ended: EndedAttempt, error: Exception) -> EndedAttempt:
    """The same end as failed(result_unstorable), without what the database rejected."""
    return replace(
        ended,
        outcome="failed",
        state="failed",
        reason="result_unstorable",
        detail=type(error).__name__,
        result=None,
        definition_state=None,
        error={"type": "ResultUnstorable", "message": "the database does not take this result"},
        error_cause="result_unstorable",
        trail=replace(ended.trail, claims=None, flags=None, progress=None),
    )
