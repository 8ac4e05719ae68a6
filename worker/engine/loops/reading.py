"""Reads the catalogue of a process that runs handlers: child processes report what is installed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from worker.engine.attempt.plan import HandlerRegistry
from worker.handlers.catalogue import HandlerEntry, read_catalogue
from worker.handlers.installed import distributions
from worker.handlers.schema import Schema
from worker.telemetry.events import emit

# At most this many unchecked rules of one handler are reported.
MAX_REPORTED = 10


class CatalogueSink(Protocol):
    """Where a catalogue is stored. Raises Unavailable; then all of it is read again."""

    async def put(self, entries: Sequence[HandlerEntry]) -> None:
        """Store entries, broken or not."""

    async def offer(self, names: Sequence[str]) -> None:
        """Set the handlers that this process runs."""

    async def complete(self, known: Mapping[str, Collection[str]]) -> None:
        """Forget all handlers of these distributions but those that are known."""


@dataclass
class CatalogueReader:
    """Reads the catalogue once per incarnation; each handler is offered as soon as it has been read.

    `describing` returns the socket of a process that waits to read it, if there is one, and only once.
    `on_read` is called when all of it is stored.
    """

    sink: CatalogueSink
    handlers: HandlerRegistry
    on_offered: Callable[[], None]
    pass_environment: Sequence[str]
    command: Sequence[str]
    describing: Callable[[], socket.socket | None] = lambda: None
    on_read: Callable[[], None] = lambda: None
    _has_read: bool = False

    async def run(self) -> None:
        """Read it once, then wait for cancellation."""
        if not self._has_read:
            everyone = distributions()
            versions = {found.name: found.version for found in everyone}
            names: dict[str, set[str]] = {name: set() for name in versions}
            reading = read_catalogue(
                pass_environment=self.pass_environment,
                command=self.command,
                forked=self.describing(),
                everyone=everyone,
            )
            async for found in reading:
                for entry in found:
                    names.setdefault(entry.distribution, set()).add(entry.name)
                await self._take(found)
            await self.sink.complete(names)
            for distribution, known in names.items():
                offered = sum(self.handlers.get(name) is not None for name in known)
                version = versions.get(distribution)
                emit("handlers.loaded", distribution=distribution, version=version, handlers=offered)
            self._has_read = True
            self.on_read()
        await asyncio.Event().wait()

    async def _take(self, entries: Sequence[HandlerEntry]) -> None:
        # First here: once they are stored, a worker may send runs of them to a host.
        offered = [entry for entry in entries if self.handlers.add(entry)]
        await self.sink.put(entries)
        for entry in entries:
            if entry.error is not None:
                emit(
                    "handler.broken",
                    handler=entry.name,
                    distribution=entry.distribution,
                    version=entry.version,
                    error=entry.error,
                )
        for entry in offered:
            _report_unchecked(entry)
        if offered:
            await self.sink.offer(self.handlers.names())
            self.on_offered()


def _report_unchecked(entry: HandlerEntry) -> None:
    """Report the rules of the params schema that only the run's own process checks."""
    if entry.params_schema is not None:
        for rule in islice(Schema(entry.params_schema).unchecked(), MAX_REPORTED):
            emit(
                "handler.unchecked",
                handler=entry.name,
                distribution=entry.distribution,
                place=rule.place,
                reason=rule.reason,
            )
