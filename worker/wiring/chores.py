"""The chores of schedules: templates reach their orgs, batch by batch, beside what is due."""

from __future__ import annotations

from worker.execution.housekeeping import Housekeeping
from worker.operations.materialise import materialise
from worker.store.database import Database
from worker.telemetry.events import emit

# Seconds between two looks; an org that is new has what templates make for it within two of them.
EVERY = 1.0


class Chores:
    """Each chore works in transactions of its own, so that nothing waits for a long one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_to(self, housekeeping: Housekeeping) -> None:
        """Let the housekeeping tick them."""
        housekeeping.every(EVERY, "templates", self.templates)

    async def templates(self) -> None:
        """Carry orgs to the newest templates until none is behind."""
        while (done := await self._database.run(materialise, self._database)).orgs:
            for name, reached, total in done.progress:
                emit("template.progress", template=name, done=reached, total=total)
