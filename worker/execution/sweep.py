"""Sweep: runs that nothing else would touch are promoted, expire, or say that no worker has their handler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from worker.ids import RunId
from worker.telemetry.events import emit


class Names(Protocol):
    """What people call a run's org and definition, as far as their rows are there."""

    @property
    def org(self) -> str | None: ...
    @property
    def definition(self) -> str | None: ...


class Swept(Protocol):
    """A run that ended without having started."""

    @property
    def run_id(self) -> RunId: ...
    @property
    def names(self) -> Names: ...
    @property
    def attempt(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


class SweepStore(Protocol):
    async def sweep(self) -> Sequence[Swept]:
        """Promote, expire and mark; give the runs that ended by it."""
        ...


async def sweep(store: SweepStore) -> None:
    """Sweep once, and tell of each run that ended by it."""
    for swept in await store.sweep():
        emit(
            "run.changed",
            org=swept.names.org,
            run=swept.run_id,
            definition=swept.names.definition,
            attempt=swept.attempt,
            state=swept.state,
            reason=swept.reason,
        )
