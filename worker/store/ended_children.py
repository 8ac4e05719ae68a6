"""Ended children: what their ends change in their families is looked at a few times a second.

Of a large tree nearly every end changes nothing. Its batches of ends are many and small where runs have
processes, and a look after each cost a child a third of its processor time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

from worker.errors import StoreUnavailable
from worker.ids import RunId
from worker.store import families
from worker.store.database import Database
from worker.telemetry.events import emit

# Seconds from one look to the next.
PACE = 0.05


class EndedChildren:
    """Children whose ends are committed. The first look comes at once; `families.look` repeats what fails."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ended: set[RunId] = set()
        self._looking: asyncio.Task[None] | None = None

    def add(self, ended: Collection[RunId]) -> None:
        self._ended.update(ended)
        if self._ended and self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def finish(self) -> None:
        """Return once all that was added is looked at."""
        if self._looking is not None:
            await asyncio.wait([self._looking])

    async def _look(self) -> None:
        try:
            while self._ended:
                ended, self._ended = self._ended, set()
                with suppress(StoreUnavailable):
                    await self._settle(ended)
                await asyncio.sleep(PACE)
        except Exception as error:
            emit("loop.failed", loop="families", error=type(error).__name__)
        finally:
            self._looking = None

    async def _settle(self, ended: Collection[RunId]) -> None:
        if await self._database.call_autocommit(families.unsettled, ended):
            await self._database.call(families.settle, ended)
