"""The catalogue in the database: the handlers of installed distributions, as child processes read them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from worker.clock import Clock, SystemClock
from worker.handlers.catalogue import HandlerEntry, read_catalogue
from worker.handlers.installed import distributions
from worker.operations.confinement import confinement_of
from worker.settings import Settings
from worker.store import catalogue
from worker.store.database import Database
from worker.store.worker_store import WorkerStore


def store_unknown(settings: Settings, database: Database) -> None:
    """Read and store the handlers of installed distributions that the database lacks in this version.

    Does not wait for a worker that is reading the same distribution.
    """
    with database.autocommit() as connection:
        known = catalogue.offered(connection)
    unknown = [
        found.name
        for found in distributions()
        if not known.issuperset((found.name, found.version, point.name) for point in found.points)
    ]
    if unknown:
        entries = asyncio.run(read_entries(settings, unknown))
        with database.transaction() as connection:
            catalogue.put(connection, entries, at=SystemClock().now())


def installed_entries(settings: Settings) -> list[HandlerEntry]:
    """The handlers of all installed distributions, by name, without a database."""
    entries = asyncio.run(read_entries(settings, [found.name for found in distributions()]))
    return sorted(entries, key=lambda entry: (entry.name, entry.distribution))


async def read_entries(settings: Settings, names: Sequence[str]) -> list[HandlerEntry]:
    """The handlers of these distributions, each read in a process of its own."""
    passed, command = settings.execution.pass_environment, confinement_of(settings).describe
    reading = read_catalogue(names, pass_environment=passed, command=command)
    return [entry async for found in reading for entry in found]


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
