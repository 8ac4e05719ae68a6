"""The catalogue: child processes read what handlers are installed; the database and the registry keep it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from worker.clock import Clock, SystemClock
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.handlers.catalogue import HandlerEntry, installed, read_catalogue
from worker.handlers.installed import distributions
from worker.handlers.schema import Schema
from worker.operations.confinement import confinement_of
from worker.settings import Settings
from worker.store import catalogue
from worker.store.database import Database
from worker.store.worker_store import WorkerStore
from worker.telemetry.events import emit

# At most this many unchecked rules of one handler are reported.
MOST_REPORTED = 10


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
    return [entry async for entry in read_catalogue(names, pass_environment=passed, command=command)]


@dataclass
class CatalogueReader:
    """Reads the catalogue once per process; each handler is offered as soon as it has been read."""

    database: Database
    store: WorkerStore
    handlers: HandlerRegistry
    clock: Clock
    on_offered: Callable[[], None]
    pass_environment: Sequence[str]
    command: Sequence[str]
    _has_read: bool = False

    async def run(self) -> None:
        """Read it once, then wait for cancellation."""
        if not self._has_read:
            names: dict[str, set[str]] = {name: set() for name in installed()}
            reading = read_catalogue(pass_environment=self.pass_environment, command=self.command)
            async for entry in reading:
                names.setdefault(entry.distribution, set()).add(entry.name)
                await self._take(entry)
            for distribution, known in names.items():
                await self.database.call(catalogue.forget, distribution, but=known)
                offered = sum(self.handlers.get(name) is not None for name in known)
                version = installed().get(distribution)
                emit("handlers.loaded", distribution=distribution, version=version, handlers=offered)
            self._has_read = True
        await asyncio.Event().wait()

    async def _take(self, entry: HandlerEntry) -> None:
        await self.database.call(catalogue.put, [entry], at=self.clock.now())
        if entry.error is not None:
            emit(
                "handler.broken",
                handler=entry.name,
                distribution=entry.distribution,
                version=entry.version,
                error=entry.error,
            )
        elif self.handlers.add(entry):
            _report_unchecked(entry)
            await self.store.handlers_changed(self.handlers.names())
            self.on_offered()


def _report_unchecked(entry: HandlerEntry) -> None:
    """Report the rules of the params schema that only the run's own process checks."""
    if entry.params_schema is not None:
        for rule in islice(Schema(entry.params_schema).unchecked(), MOST_REPORTED):
            emit(
                "handler.unchecked",
                handler=entry.name,
                distribution=entry.distribution,
                place=rule.place,
                reason=rule.reason,
            )
