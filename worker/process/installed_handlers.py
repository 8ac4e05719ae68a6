"""The handlers of installed distributions, each read in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from worker.clock import SystemClock
from worker.errors import NotFound, did_you_mean
from worker.handlers.catalogue import HandlerEntry, read_catalogue
from worker.handlers.installed import distributions
from worker.process.confinement import confinement_of
from worker.settings import Settings
from worker.store import catalogue
from worker.store.database import Database


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


async def find_handler(name: str, settings: Settings) -> HandlerEntry:
    """The handler of that name, read from its distribution in a separate process.

    Raises NotFound if no installed distribution offers it or it cannot be loaded.
    """
    offering = [found.name for found in distributions() if any(point.name == name for point in found.points)]
    entry = next((entry for entry in await read_entries(settings, offering) if entry.name == name), None)
    if entry is None:
        close = did_you_mean(name, (point.name for found in distributions() for point in found.points))
        fix = f"install its distribution, or create the handler with `new-job {name}`"
        raise NotFound(f"no installed distribution offers a handler {name}", fix=f"{close} {fix}".strip())
    if entry.error is not None:
        raise NotFound(
            f"handler {name} of {entry.distribution} {entry.version} cannot be loaded: {entry.error}",
            fix=f"fix {entry.entry_point.partition(':')[0]}, or the entry point in pyproject.toml",
        )
    return entry


async def read_entries(settings: Settings, names: Sequence[str]) -> list[HandlerEntry]:
    """The handlers of these distributions, each read in a process of its own."""
    passed, command = settings.execution.pass_environment, confinement_of(settings).describe
    reading = read_catalogue(names, pass_environment=passed, command=command)
    return [entry async for found in reading for entry in found]


async def children_of(entry: HandlerEntry, settings: Settings) -> list[HandlerEntry]:
    """The handlers that a handler may start, and those that these may start.

    Raises:
        NotFound: one of them is not installed.
    """
    found = {entry.name: entry}
    wanted = list(entry.children)
    for name in wanted:
        if name not in found:
            found[name] = await find_handler(name, settings)
            # The loop goes on with these.
            wanted += found[name].children
    return [each for each in found.values() if each is not entry]
