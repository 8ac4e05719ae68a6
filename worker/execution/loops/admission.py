"""Admission: waiting → running, as many as there are free slots, fair over all orgs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import Inflight
from worker.execution.loops.wakeups import woken
from worker.runs.run import AdmittedRun, Isolation

# Fewer free slots than this while more waits are not worth a transaction: more are free in a moment.
FEW = 100
# Seconds of that moment.
MOMENT = 0.002


class AdmitStore(Protocol):
    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        """Mark the next waiting runs running, within every limit, and give them."""
        ...


class Admission:
    """Fills this worker's free slots; woken by fire, by an end written, and by each poll.

    `start` gets the admitted runs, in the order they were ranked; `on_admitting` is called
    when the database has let this worker admit, the first time and after each outage.
    """

    def __init__(
        self,
        store: AdmitStore,
        holdings: Inflight,
        offers: HandlerRegistry,
        clock: Clock,
        *,
        slots: Mapping[Isolation, int],
        poll: float,
        start: Callable[[Sequence[AdmittedRun]], None],
        on_admitting: Callable[[], None],
    ) -> None:
        self._store = store
        self._holdings = holdings
        self._offers = offers
        self._clock = clock
        self._slots = slots
        self._poll = poll
        self._start = start
        self._on_admitting = on_admitting
        self.wake = asyncio.Event()
        self.admitting = False
        self.ticked_at = clock.monotonic()
        self._more_wait = False

    async def run(self) -> None:
        """Admit for ever; ends by cancellation, never between the answer and its runs' start."""
        while True:
            self.wake.clear()
            admitted = await self._admit()
            self.ticked_at = self._clock.monotonic()
            if not admitted:
                await woken(self.wake, self._poll)

    async def _admit(self) -> bool:
        if self._more_wait and 0 < sum(self._free().values()) < FEW:
            await self._clock.sleep(MOMENT)
        free = self._free()
        if not any(free.values()):
            return False
        asked = asyncio.create_task(self._store_admit(free))
        try:
            # Shielded: a drain must not lose the answer, or its runs wait for two renewals.
            runs = await asyncio.shield(asked)
        except asyncio.CancelledError:
            # Nor go on without it: what is admitted now has to be stopped with the rest.
            await asyncio.wait({asked})
            raise
        except Unavailable:
            self.admitting = False
            return False
        self._more_wait = len(runs) == sum(free.values())
        if not self.admitting:
            self.admitting = True
            self._on_admitting()
        return bool(runs)

    def _free(self) -> dict[Isolation, int]:
        return {
            isolation: max(0, slots - self._holdings.used(isolation))
            for isolation, slots in self._slots.items()
        }

    async def _store_admit(self, free: Mapping[Isolation, int]) -> Sequence[AdmittedRun]:
        runs = await self._store.admit(self._offers.limits(), free)
        self._start(runs)
        return runs
