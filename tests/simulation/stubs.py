"""Parts of a worker that a simulation does without: health over HTTP, watched files, plug-ins."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.simulation import jobs
from tests.simulation.loop import SimulatedProcess, process_now
from worker.pacing import Turns
from worker.telemetry import mask_in_turn


class Health:
    """What the vitals say; nobody asks for it over HTTP here."""

    def __init__(self) -> None:
        self.vitals: Any = None

    def starting(self) -> None:
        self.vitals = None

    def watch(self, vitals: Any) -> None:
        self.vitals = vitals

    def draining(self) -> bool:
        return self.vitals is not None and self.vitals.draining()

    def stalled(self) -> list[str]:
        return [] if self.vitals is None or self.draining() else self.vitals.stalled()


class Files:
    every = 3600.0

    def look(self) -> None:
        """No file is watched."""


class TurnsOfEach:
    """In place of the `Turns` of masking, which all workers in this one process would share."""

    def __init__(self) -> None:
        self._turns: dict[SimulatedProcess | None, Turns] = {}

    async def take(self, size: int) -> None:
        await self._turns.setdefault(process_now(), Turns(mask_in_turn.AT_ONCE)).take(size)


class Reader:
    """In place of the `CatalogueReader`, whose child processes would import plug-ins."""

    def __init__(
        self, sink: Any, handlers: Any, on_offered: Any, *rest: Any, on_read: Any, **more: Any
    ) -> None:
        self._parts = sink, handlers, on_offered, on_read
        self._has_read = False

    async def run(self) -> None:
        sink, handlers, on_offered, on_read = self._parts
        if not self._has_read:
            offered = [entry for entry in jobs.entries() if handlers.add(entry)]
            await sink.put(offered)
            await sink.offer(handlers.names())
            on_offered()
            await sink.complete({jobs.DISTRIBUTION: [entry.name for entry in offered]})
            self._has_read = True
            on_read()
        await asyncio.Event().wait()
