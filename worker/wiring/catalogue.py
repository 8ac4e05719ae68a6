"""The catalogue in the database: the handlers of a worker's installed distributions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from worker.clock import Clock
from worker.handlers.catalogue import HandlerEntry
from worker.store import catalogue
from worker.store.database import Database
from worker.store.worker_store import WorkerStore


@dataclass(frozen=True, slots=True)
class StoredCatalogue:
    """The `CatalogueSink` of a worker: the tables `catalogue` and `workers`."""

    database: Database
    store: WorkerStore
    clock: Clock

    async def put(self, entries: Sequence[HandlerEntry]) -> None:
        await self.database.call(catalogue.put, entries, at=self.clock.now())

    async def offer(self, names: Sequence[str]) -> None:
        await self.store.handlers_changed(names)

    async def complete(self, known: Mapping[str, Collection[str]]) -> None:
        for distribution, names in known.items():
            await self.database.call(catalogue.forget, distribution, but=names)
