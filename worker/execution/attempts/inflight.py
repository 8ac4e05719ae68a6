"""In flight: the runs of this process, and how to reach each of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from worker.definitions.policies import CANCEL_GRACE
from worker.execution.attempts.plan import AttemptPlan
from worker.execution.runners.contract import StopSignal
from worker.ids import RunId
from worker.runs.run import AdmittedRun

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class InflightRun:
    """One admitted run of ours, from admission until its end is written.

    `plan` is known once its attempt has read it; `moved` says that the attempt has
    saved a checkpoint other than the one it began with.
    """

    run: AdmittedRun
    stop: StopSignal
    plan: AttemptPlan | None = None
    moved: bool = False

    @property
    def cancel_grace(self) -> timedelta:
        return CANCEL_GRACE if self.plan is None else self.plan.definition.cancel_grace

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` gives, or None as soon as this run is asked to stop."""
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


class Inflight:
    """What we hold, by run; a later admission of the same run replaces the earlier."""

    def __init__(self) -> None:
        self._held: dict[RunId, InflightRun] = {}
        self._slots: Counter[str] = Counter()

    def add(self, run: AdmittedRun) -> InflightRun:
        held = InflightRun(run, StopSignal())
        self.release(self._held.get(run.id))
        self._held[run.id] = held
        self._slots[run.isolation] += 1
        return held

    def release(self, held: InflightRun | None) -> None:
        """Let go of a run whose end is written, or that is no longer ours."""
        if held is not None and self._held.get(held.run.id) is held:
            del self._held[held.run.id]
            self._slots[held.run.isolation] -= 1

    def get(self, run_id: RunId) -> InflightRun | None:
        return self._held.get(run_id)

    def used(self, isolation: str) -> int:
        """How many runs of this isolation hold a slot."""
        return self._slots[isolation]

    def fences(self) -> dict[RunId, int]:
        """Each held run's fencing token, as of now; safe to call from another thread."""
        return {run_id: held.run.fencing_token for run_id, held in self._held.copy().items()}

    def __iter__(self) -> Iterator[InflightRun]:
        return iter(list(self._held.values()))

    def __len__(self) -> int:
        return len(self._held)
