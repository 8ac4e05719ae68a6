"""In flight: the runs of this process, how to stop each of them, and when its timeout passes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from worker.definitions import CANCEL_GRACE
from worker.execution.attempts.plan import AttemptPlan
from worker.execution.runners.contract import StopSignal
from worker.ids import RunId
from worker.runs.run import AdmittedRun
from worker.secret import AccessToken
from worker.telemetry.masking import masker
from worker.telemetry.secret_forms import parts_of

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class InflightRun:
    """An admitted run, until its end is written.

    `moved` once the attempt has stored a new checkpoint or step; `storing` are steps that are being
    stored, which a process may leave behind that dies. `scopes` are those that its tokens must have. A host
    knows no `plan`. `masked` are its tokens, and its secrets, which are private to the org.
    """

    run: AdmittedRun
    stop: StopSignal
    plan: AttemptPlan | None = None
    org_code: str | None = None
    cancel_grace: timedelta = CANCEL_GRACE
    scopes: frozenset[str] = frozenset()
    moved: bool = False
    storing: set[asyncio.Future[Any]] | None = None
    masked: tuple[tuple[str, bool], ...] = field(default=(), repr=False)

    def begin(self, plan: AttemptPlan) -> None:
        """Keep what the attempt needs to know."""
        self.plan = plan
        self.org_code = plan.org.code
        self.cancel_grace = plan.definition.cancel_grace

    def hold(self, token: AccessToken) -> None:
        """Mask a token of this run in all that the worker writes, until `drop_tokens`."""
        if (key := (token.reveal(), False)) not in self.masked:
            masker.hold(token.reveal(), self.run.org_id, is_token=True)
            self.masked += (key,)

    def hold_secrets(self, secrets: Mapping[str, str]) -> None:
        """Mask secrets that the run gets in texts of its org; also the long texts in one that is JSON."""
        for value in secrets.values():
            for text in parts_of(value):
                if (key := (text, True)) not in self.masked:
                    masker.hold(text, self.run.org_id, private=True)
                    self.masked += (key,)

    def drop_tokens(self) -> None:
        """The attempt has ended: all of its output is masked."""
        for text, private in self.masked:
            masker.release(text, self.run.org_id, private=private)
        self.masked = ()

    async def store(self, storing: Coroutine[Any, Any, T]) -> T:
        """The result of storing a step. It goes on if the caller is cancelled: the call was made and paid."""
        task = asyncio.ensure_future(storing)
        self.storing = self.storing or set()
        self.storing.add(task)
        task.add_done_callback(self.storing.discard)
        return await asyncio.shield(task)

    async def stored(self) -> None:
        """Wait for the steps that are being stored: the end of the attempt would fence them out."""
        if self.storing:
            await asyncio.wait(self.storing)

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None as soon as this run is asked to stop."""
        if self.stop.asked:
            work.close()
            return None
        task, interrupted = asyncio.current_task(), False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = task is not None and task.cancel()

        self.stop.on_request(interrupt)
        try:
            return await work
        except asyncio.CancelledError:
            if interrupted and task is not None and task.uncancel() == 0:
                return None
            raise
        finally:
            self.stop.on_request(None)


class InflightRuns:
    """The runs that this process holds; a later admission of a run replaces the earlier one."""

    def __init__(self) -> None:
        self._runs: dict[RunId, InflightRun] = {}
        self._slots: Counter[str] = Counter()

    def add(self, run: AdmittedRun) -> InflightRun:
        inflight = InflightRun(run, StopSignal())
        if run.id in self._runs:
            self.release(self._runs[run.id])
        self._runs[run.id] = inflight
        self._slots[run.isolation] += 1
        return inflight

    def release(self, inflight: InflightRun) -> None:
        """Drop a run whose end is written, or that is no longer ours."""
        if self._runs.get(inflight.run.id) is inflight:
            del self._runs[inflight.run.id]
            self._slots[inflight.run.isolation] -= 1

    def get(self, run_id: RunId) -> InflightRun | None:
        return self._runs.get(run_id)

    def used(self, isolation: str) -> int:
        return self._slots[isolation]

    def fencing_tokens(self) -> dict[RunId, int]:
        """The fencing token of each run; thread-safe."""
        return {run_id: inflight.run.fencing_token for run_id, inflight in self._runs.copy().items()}

    def __iter__(self) -> Iterator[InflightRun]:
        return iter(list(self._runs.values()))


class Deadlines:
    """The timeouts of all handlers, over one timer: a timer each would cost more than calling a handler."""

    def __init__(self) -> None:
        self._open: dict[StopSignal, tuple[float, float]] = {}  # due at, and the grace then
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stop: StopSignal, timeout: timedelta, grace: timedelta) -> None:
        """Request a stop after `timeout`, unless discarded before."""
        due_at = asyncio.get_running_loop().time() + timeout.total_seconds()
        self._open[stop] = (due_at, grace.total_seconds())
        if self._timer is None or due_at < self._timer.when():
            self._wake_at(due_at)

    def discard(self, stop: StopSignal) -> None:
        self._open.pop(stop, None)

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._stop_overdue)

    def _stop_overdue(self) -> None:
        self._timer = None
        now, first = asyncio.get_running_loop().time(), float("inf")
        for stop, (due_at, grace) in list(self._open.items()):
            if (due_at := due_at + stop.frozen_seconds(now)) <= now:
                del self._open[stop]
                stop.request("timeout", grace)
            else:
                first = min(first, due_at)
        if self._open:
            self._wake_at(first)
