"""The loop of a worker that evaluates rollouts."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from worker.clock import Clock
from worker.features.rollouts.evaluation import Evaluation
from worker.settings import Settings
from worker.store.database import Database
from worker.wiring.addition import Joined, Parts


@dataclass
class RolloutsOfWorker:
    """Evaluates the rollouts that run, one after another, every `poll` and at least every second."""

    settings: Settings
    clock: Clock

    def bind(self) -> None:
        return

    def serving(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def prepare(self, database: Database) -> None:
        return

    def join(self, parts: Parts) -> Joined:
        every = max(self.settings.execution.poll.total_seconds(), 1.0)
        store = parts.store
        return Joined({"rollouts": Evaluation(store.database, store.rollouts, self.clock, every).run})
