"""Admission: waiting → running, as many as there are free slots, fair over all orgs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.signals import wait_for
from worker.errors import Unavailable
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, Isolation

# With fewer free slots than this and than a tenth of all, and more runs waiting, wait `MOMENT` seconds for
# others to become free: slots of runs that request tokens come one by one.
FEW = 100
MOMENT = 0.01


class AdmitStore(Protocol):
    async def admit(
        self, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> Sequence[AdmittedRun]:
        """Mark the next waiting runs running, within every limit, and return them."""


@dataclass(eq=False, repr=False)
class Admission:
    """Fills this worker's free slots. Woken by the scheduler, by written ends, and by each poll.

    `start` gets the admitted runs in rank order. `on_taking` is called when the database lets this
    worker admit, for the first time and after each outage. It admits nothing while there is a `fault`.
    """

    store: AdmitStore
    inflight_runs: InflightRuns
    handlers: HandlerRegistry
    clock: Clock
    slots: Mapping[Isolation, int]
    poll: float
    start: Callable[[Sequence[AdmittedRun]], None]
    on_taking: Callable[[], None]
    fault: Callable[[], str | None] = lambda: None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    taking: bool = False
    _more_wait: bool = False
    _running: bool = False
    # Slots that are being filled by the transaction that writes ends, and whether that has returned.
    _refilling: int = 0
    _refilled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.ticked_at = self.clock.monotonic()
        self._refilled.set()

    async def run(self) -> None:
        """Admit until cancelled, but never between the database's answer and the start of its runs."""
        self._running = True
        try:
            while True:
                self.wake.clear()
                admitted = await self._admit()
                self.ticked_at = self.clock.monotonic()
                if not admitted:
                    await wait_for(self.wake, self.poll)
        finally:
            self._running = False
            await self._refilled.wait()

    def begin(
        self, ended: Sequence[EndedAttempt]
    ) -> tuple[Mapping[str, int | None], Mapping[Isolation, int]]:
        """What the transaction that writes these ends may admit to their slots, if more runs wait.

        The offered handlers, and only their slots: all others are `_admit`'s, which may be waiting for the
        database. Without slots neither `end` nor a start follows.
        """
        free: Counter[Isolation] = Counter()
        if self._running and self._more_wait and self.fault() is None:
            for attempt in ended:
                inflight = self.inflight_runs.get(attempt.run_id)
                if inflight is not None and inflight.run.fencing_token == attempt.fencing_token:
                    free[inflight.run.isolation] += 1
        self._refilling = free.total()
        if free:
            self._refilled.clear()
        return self.handlers.limits(), free

    def end(self, admitted: Sequence[AdmittedRun]) -> None:
        """Start what was admitted so; the ends have freed their slots."""
        self._more_wait = len(admitted) == self._refilling
        if admitted:
            self.start(admitted)
        self._refilled.set()

    async def _admit(self) -> bool:
        if self.fault() is not None:
            return False
        few = min(FEW, sum(self.slots.values()) // 10)
        if self._more_wait and 0 < sum(self._free().values()) < few:
            await self.clock.sleep(MOMENT)
        free = self._free()
        if not any(free.values()):
            return False
        admitting = asyncio.create_task(self._admit_and_start(free))
        try:
            # Shielded: if a drain lost the answer, its runs would wait for two renewals.
            runs = await asyncio.shield(admitting)
        except asyncio.CancelledError:
            # What is admitted now has to be stopped with the rest.
            await asyncio.wait({admitting})
            raise
        except Unavailable:
            self.taking = False
            return False
        self._more_wait = len(runs) == sum(free.values())
        if not self.taking:
            self.taking = True
            self.on_taking()
        return bool(runs)

    def _free(self) -> dict[Isolation, int]:
        used = self.inflight_runs.used
        return {isolation: max(0, slots - used(isolation)) for isolation, slots in self.slots.items()}

    async def _admit_and_start(self, free: Mapping[Isolation, int]) -> Sequence[AdmittedRun]:
        runs = await self.store.admit(self.handlers.limits(), free)
        self.start(runs)
        return runs
