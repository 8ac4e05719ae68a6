"""The catalogue between the children that read it, the database that keeps it, and the offers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import islice

from worker.clock import Clock
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.handlers.catalogue import HandlerEntry, installed, read_catalogue
from worker.handlers.installed import distributions
from worker.handlers.schema import Schema
from worker.store import catalogue
from worker.store.database import Database
from worker.store.worker_store import WorkerStore
from worker.telemetry.events import emit

# Unchecked rules of one handler that are named.
MOST_TOLD = 10


def store_unknown(
    database: Database, clock: Clock, *, command: Sequence[str], pass_environment: Sequence[str] = ()
) -> None:
    """Read what distributions installed here offer, of those the database has not, or in another version.

    One that a worker is still reading, name by name, is read here as well.
    """
    with database.autocommit() as connection:
        known = catalogue.offered(connection)
    unknown = [
        found.name
        for found in distributions()
        if not known.issuperset((found.name, found.version, point.name) for point in found.points)
    ]
    if unknown:
        reading = read_catalogue(unknown, pass_environment=pass_environment, command=command)
        asyncio.run(_store(database, reading, clock))


async def _store(database: Database, reading: AsyncIterator[HandlerEntry], clock: Clock) -> None:
    entries = [entry async for entry in reading]
    with database.transaction() as connection:
        catalogue.put(connection, entries, at=clock.now())


def _tell_unchecked(entry: HandlerEntry) -> None:
    """Say once which rules of the params' schema only the run's own process checks."""
    if entry.params_schema is not None:
        for left in islice(Schema(entry.params_schema).unchecked(), MOST_TOLD):
            emit(
                "handler.unchecked",
                handler=entry.name,
                distribution=entry.distribution,
                place=left.place,
                reason=left.reason,
            )


class Cataloguing:
    """Reads the catalogue at the start; each handler is offered as soon as its child has answered."""

    def __init__(
        self,
        database: Database,
        store: WorkerStore,
        offers: HandlerRegistry,
        clock: Clock,
        on_offered: Callable[[], None],
        pass_environment: Sequence[str],
        command: Sequence[str],
    ) -> None:
        self._database = database
        self._store = store
        self._offers = offers
        self._clock = clock
        self._on_offered = on_offered
        self._pass_environment = pass_environment
        self._command = command
        self._read = False

    async def run(self) -> None:
        """Read it once, tell of each distribution, then wait to be cancelled."""
        if not self._read:
            names: dict[str, set[str]] = {name: set() for name in installed()}
            reading = read_catalogue(pass_environment=self._pass_environment, command=self._command)
            async for entry in reading:
                names.setdefault(entry.distribution, set()).add(entry.name)
                await self._take(entry)
            for distribution, known in names.items():
                await self._database.call(catalogue.forget, distribution, but=known)
                offered = [name for name in known if self._offers.get(name) is not None]
                version = installed().get(distribution)
                emit("handlers.loaded", distribution=distribution, version=version, handlers=len(offered))
            self._read = True
        await asyncio.Event().wait()

    async def _take(self, entry: HandlerEntry) -> None:
        await self._database.call(catalogue.put, [entry], at=self._clock.now())
        if entry.error is not None:
            emit(
                "handler.broken",
                handler=entry.name,
                distribution=entry.distribution,
                version=entry.version,
                error=entry.error,
            )
        elif self._offers.add(entry):
            _tell_unchecked(entry)
            await self._store.handlers_changed(self._offers.names())
            self._on_offered()
