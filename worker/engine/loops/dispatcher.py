"""Dispatcher: starts an attempt for each admitted run and passes its end to the finisher."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import timedelta
from heapq import nlargest
from itertools import islice
from typing import Generic, TypeVar

from worker.engine.attempt.inflight import InflightRun, InflightRuns, run_ended, run_fenced_out
from worker.engine.attempt.tools import HandlerTools
from worker.engine.loops.finisher import Finisher, FinishStore
from worker.engine.runners.contract import start_task, stop_reason_of
from worker.errors import Unavailable
from worker.ids import RunId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun
from worker.telemetry.events import emit

# Attempts started in one iteration of the loop: ends are written between bursts, and nothing waits long.
BURST = 50
# Runs for which plans and credentials are read together.
PREPARED = 500


T = TypeVar("T", bound=HandlerTools)


@dataclass(eq=False, repr=False)
class Dispatcher(Generic[T]):
    """Runs `attempt` for all admitted runs.

    `on_free` is called after ends were written, so that admission continues. `on_end` is called with each
    accepted end, and its run if that was still held, after `report`.
    """

    tools: T
    attempt: Callable[[InflightRun, T], Awaitable[EndedAttempt]]
    inflight_runs: InflightRuns
    store: InitVar[FinishStore]
    on_free: Callable[[], None]
    on_end: Callable[[EndedAttempt, InflightRun | None], None]
    report: Callable[[EndedAttempt, InflightRun | None], None] = run_ended
    _attempts: set[asyncio.Task[None]] = field(default_factory=set)
    # Admitted runs, until what they need is read; then until they start.
    _admitted: deque[InflightRun] = field(default_factory=deque)
    _queue: deque[InflightRun] = field(default_factory=deque)
    _preparing: asyncio.Task[None] | None = None
    _starting: asyncio.Task[None] | None = None

    def __post_init__(self, store: FinishStore) -> None:
        self.finisher = Finisher(
            store, self.tools.clock, self._written, self._unstorable, starting=lambda: bool(self._queue)
        )

    @property
    def running(self) -> int:
        return len(self._attempts) + len(self._admitted) + len(self._queue)

    def start(self, runs: Iterable[AdmittedRun]) -> None:
        """Start the attempts of runs that were just admitted, in this order, once what they need is read.

        A tenth goes before those that still queue here, if it became due later: see `RingWalk.admit`. What
        was handed back meanwhile is not started: another process may have it.
        """
        held = self.inflight_runs
        self._admitted.extend([held.add(run) for run in runs if not held.is_late(run)])
        if self._admitted and (self._preparing is None or self._preparing.done()):
            self._preparing = start_task(self._prepare_admitted())

    async def _prepare_admitted(self) -> None:
        while self._admitted:
            prepared = list(islice(self._admitted, PREPARED))
            await self._prepare([inflight.run for inflight in prepared])
            for _ in prepared:
                self._admitted.popleft()
            self._enqueue(prepared)
            if self._starting is None or self._starting.done():
                self._starting = start_task(self._start_queued())

    def _enqueue(self, added: list[InflightRun]) -> None:
        if self._queue:
            head = self._queue[0].run.available_at
            newest = nlargest(len(added) // 10 + 1, added, key=lambda inflight: inflight.run.available_at)
            ahead = {inflight.run.id: inflight for inflight in newest if inflight.run.available_at > head}
            if ahead:
                self._queue.extendleft(ahead.values())
                added = [inflight for inflight in added if inflight.run.id not in ahead]
        self._queue.extend(added)

    async def _start_queued(self) -> None:
        while self._queue:
            for _ in range(min(BURST, len(self._queue))):
                task = start_task(self._attempt(self._queue.popleft()))
                if not task.done():
                    self._attempts.add(task)
                    task.add_done_callback(self._attempts.discard)
            await asyncio.sleep(0)

    async def _prepare(self, runs: Sequence[AdmittedRun]) -> None:
        """Read together what these runs need. Each attempt reads for itself what is missing."""
        try:
            await self.tools.prepare(runs)
        except Unavailable:  # which is reported once for all that ask the database
            pass
        except Exception as error:
            emit("loop.failed", loop="dispatcher", error=f"{type(error).__name__}: {error}")

    def cancel(self, run_id: RunId, reason: str) -> None:
        inflight = self.inflight_runs.get(run_id)
        if inflight is not None:
            inflight.stop.request(stop_reason_of(reason), inflight.cancel_grace.total_seconds())

    async def drain(self, grace: timedelta) -> None:
        """Ask every run to stop, and wait until the end of each is written."""
        self.request_drain(grace)
        if self._preparing is not None:
            await self._preparing
        if self._starting is not None:  # perhaps by the one before
            await self._starting
        while self._attempts:
            await asyncio.wait(set(self._attempts))
        await self.finisher.flushed()

    def request_drain(self, grace: timedelta) -> None:
        """Give the runs at most `grace` from now."""
        for inflight in self.inflight_runs:
            inflight.stop.request("drain", grace.total_seconds())

    def kill(self) -> None:
        for inflight in self.inflight_runs:
            inflight.stop.kill()

    async def _attempt(self, inflight: InflightRun) -> None:
        try:
            ended = await self.attempt(inflight, self.tools)
            await inflight.stored()
            await self.tools.run_log.flush_run(inflight.run)
        finally:
            inflight.drop_tokens()
        self.finisher.put(ended)

    def _written(self, ended: EndedAttempt, accepted: bool) -> None:
        inflight = self.inflight_runs.get(ended.run_id)
        if inflight is not None and inflight.run.fencing_token == ended.fencing_token:
            self.tools.run_log.ended(inflight.run)
            self.inflight_runs.release(inflight)
        if accepted:
            self.report(ended, inflight)
            self.on_end(ended, inflight)
        else:
            run_fenced_out(ended.run_id, ended.attempt, ended.fencing_token, inflight)
        self.on_free()

    def _unstorable(self, ended: EndedAttempt, error: Exception) -> None:
        inflight, kind = self.inflight_runs.get(ended.run_id), type(error).__name__
        org = inflight and inflight.org_code
        emit("result.unstorable", org=org, run=ended.run_id, attempt=ended.attempt, error=kind)
