"""The loop of a worker that evaluates rollouts."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from worker.clock import Clock
from worker.features.rollouts.evaluation import evaluate
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

        async def run() -> None:
            while True:
                for rollout_id in parts.store.rollouts.evaluated():
                    while (await parts.store.database.run(evaluate, parts.store.database, rollout_id)).again:
                        await self.clock.sleep(0)
                await self.clock.sleep(every)

        return Joined({"rollouts": run})
