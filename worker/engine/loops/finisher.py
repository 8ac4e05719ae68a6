"""Finisher: writes the ends of attempts in batches, and loses none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from worker.clock import Clock
from worker.engine.loops.admission import Admission
from worker.errors import Unavailable, WorkerError
from worker.ids import RunId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, Isolation
from worker.telemetry.events import emit

# Maximum rows of one statement: on a slow disk a commit is expensive, and more ends share it.
BATCH = 2000
# While admitted runs queue for their start, ends are collected: this number, or for this many seconds.
# A run costs worker and database less in a larger batch.
WORTHWHILE = 500
COLLECT = 0.05
# Seconds between tries while the database is unavailable.
RETRY = 0.5
# Tries after which the ends of a batch are tried one by one, since one of them may keep the others: this many
# while none is written.
TOGETHER = 10
PROBES = 3
# Seconds between tries of an end that was put aside.
RETRY_ASIDE = 5.0


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
    _refill: tuple[Admission, RefillStore] | None = None
    _pending: list[EndedAttempt] = field(default_factory=list)
    # Ends that the store does not take while it takes others.
    _aside: list[EndedAttempt] = field(default_factory=list)
    _trying: asyncio.Task[None] | None = None
    # How often the store has taken ends.
    _writes: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def refill_with(self, refill: Admission, store: RefillStore) -> None:
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
        try:
            while True:
                await self._wake.wait()
                await self._collect()
                await self._write(self._next(BATCH))
                if not self._pending and not self._aside:
                    self._idle.set()
        finally:
            if self._trying is not None:
                self._trying.cancel()

    def _next(self, most: int) -> list[EndedAttempt]:
        batch, self._pending = self._pending[:most], self._pending[most:]
        if not self._pending:
            self._wake.clear()
        return batch

    async def _collect(self) -> None:
        until = self.clock.monotonic() + COLLECT
        while self.starting() and len(self._pending) < WORTHWHILE and self.clock.monotonic() < until:
            await self.clock.sleep(0)  # meanwhile the loop starts more of them

    async def _write(self, batch: list[EndedAttempt]) -> None:
        tries, rejected = 0, None
        while batch:
            if self._refill is not None and await self._refilled(*self._refill, batch):
                return
            try:
                accepted = await self.store.finish(batch)
            except Unavailable:
                # The ends wait here; the next renewal says which runs are still ours.
                await self.clock.sleep(RETRY)
                batch = [*batch, *self._next(BATCH - len(batch))]
                tries += 1
                if tries % TOGETHER == 0:
                    batch = await self._apart(batch)
                continue
            except Exception as error:
                if len(batch) > 1:
                    for ended in batch:
                        await self._write([ended])
                    return
                if batch[0] is not rejected:
                    # Again: the change of another transaction may have been in its way.
                    rejected = batch[0]
                    continue
                if _is_bare(batch[0]):
                    self._put_aside(batch[0], error)
                    return
                batch = [self._stripped(batch[0], error)]
                continue
            self._report(batch, accepted)
            return

    async def _apart(self, batch: list[EndedAttempt]) -> list[EndedAttempt]:
        """Write the ends of a batch one by one; returns those that still wait together.

        Once the store has taken one, those that it did not take are put aside.
        """
        failed: list[tuple[EndedAttempt, Exception]] = []
        is_any_written = False
        for place, ended in enumerate(batch):
            try:
                accepted = await self.store.finish([ended])
            except Exception as error:
                failed.append((ended, error))
                if not is_any_written and len(failed) == PROBES:
                    # Others are tried first in the next round.
                    return [*batch[place + 1 :], *(one for one, _ in failed)]
            else:
                is_any_written = True
                self._report([ended], accepted)
        if not is_any_written:
            return batch
        for each in failed:
            self._put_aside(*each)
        return []

    def _put_aside(self, ended: EndedAttempt, error: Exception) -> None:
        """Try this end on its own from now on: it must not keep the others."""
        if not isinstance(error, Unavailable):  # the database may have come back just now
            emit("loop.failed", loop="finisher", error=type(error).__name__)
        self._aside.append(ended)
        if self._trying is None or self._trying.done():
            self._trying = asyncio.create_task(self._write_aside(), name="ends put aside")

    async def _write_aside(self) -> None:
        before = self._writes
        while self._aside:
            older, before = before, self._writes
            await self.clock.sleep(RETRY_ASIDE)
            for _ in range(len(self._aside)):
                # It stays until it is written: a drain waits for it.
                ended = kept = self._aside[0]
                try:
                    accepted = await self.store.finish([ended])
                except Exception as error:
                    is_unavailable = isinstance(error, Unavailable)
                    if not is_unavailable and not _is_bare(ended):
                        kept = self._stripped(ended, error)
                    elif not is_unavailable or self._writes > before > older:
                        # Others were taken in this round and in the last: it is not an outage that begins.
                        emit("loop.failed", loop="finisher", error=type(error).__name__)
                    self._aside.append(kept)
                else:
                    self._report([ended], accepted)
                del self._aside[0]
        if not self._pending:
            self._wake.set()  # to look whether all is written

    def _stripped(self, ended: EndedAttempt, error: Exception) -> EndedAttempt:
        self.on_unstorable(ended, error)
        return unstorable(ended, error)

    async def _refilled(self, refill: Admission, store: RefillStore, batch: list[EndedAttempt]) -> bool:
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
        self._writes += 1
        for ended in batch:
            self.on_written(ended, ended.run_id in accepted)


def unstorable(ended: EndedAttempt, error: Exception) -> EndedAttempt:
    """The same end as failed(result_unstorable), without what the database or a host's worker rejected."""
    message = "the database does not take this result"
    if isinstance(error, WorkerError):
        message = f"the worker does not take this end: {error.message}"
    return replace(
        ended,
        outcome="failed",
        state="failed",
        reason="result_unstorable",
        detail=type(error).__name__,
        result=None,
        definition_state=None,
        error={"type": "ResultUnstorable", "message": message},
        error_cause="result_unstorable",
        trail=replace(ended.trail, claims=None, flags=None, jti=None, progress=None, asks=()),
    )


def _is_bare(ended: EndedAttempt) -> bool:
    """Whether an end has nothing left that `unstorable` would drop."""
    trail = ended.trail
    parts = (ended.result, ended.definition_state, trail.claims, trail.flags, trail.jti, trail.progress)
    is_empty = all(part is None for part in parts) and not trail.asks
    return is_empty and ended.reason == "result_unstorable"
