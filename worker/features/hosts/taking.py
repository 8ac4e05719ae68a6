"""Taking: asks the workers for attempts, as many as this host has free slots, by long poll."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.signals import wait_for
from worker.errors import Unavailable
from worker.features.hosts.remote import RemoteStore
from worker.features.hosts.wire import Taken
from worker.model.runs.run import Isolation
from worker.telemetry.events import emit

# Seconds that a worker may wait for runs before it answers: the loop must iterate more often than `PATIENCE`.
WAIT = 10.0


@dataclass(eq=False, repr=False)
class Taking:
    """Fills this host's free slots. A request stays open for each kind of slot that is free.

    `start` gets the attempts in order. `on_taking` is called when this host can be given runs, for the first
    time and after each outage. `offers` is false until it has a handler, and while it can run none.
    """

    store: RemoteStore
    inflight_runs: InflightRuns
    clock: Clock
    slots: Mapping[Isolation, int]
    poll: float
    offers: Callable[[], bool]
    start: Callable[[Sequence[Taken]], None]
    on_taking: Callable[[], None]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    taking: bool = False
    _open: dict[asyncio.Task[None], Mapping[Isolation, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ticked_at = self.clock.monotonic()

    async def run(self) -> None:
        """Take until cancelled. What an answer brings that is lost by this, the last renewal hands back."""
        try:
            while True:
                self.wake.clear()
                self.ticked_at = self.clock.monotonic()
                free = self._uncovered()
                if free and self.offers():
                    task = asyncio.create_task(self._take(free))
                    self._open[task] = free
                    task.add_done_callback(self._answered)
                await wait_for(self.wake, self.poll)
        finally:
            for task in list(self._open):
                task.cancel()
            if self._open:
                await asyncio.wait(list(self._open))

    def reached(self) -> None:
        """A worker has answered: an open request of this host waits only for runs."""
        if not self.taking and self._open:
            self.taking = True
            self.on_taking()

    def _uncovered(self) -> dict[Isolation, int]:
        """The slots to ask for: none while each kind that is free has an open request."""
        asked: Counter[Isolation] = Counter()
        for part in self._open.values():
            asked.update(part)
        used = self.inflight_runs.used
        free = {kind: max(0, count - used(kind) - asked[kind]) for kind, count in self.slots.items()}
        return free if any(count and not asked[kind] for kind, count in free.items()) else {}

    async def _take(self, free: Mapping[Isolation, int]) -> None:
        try:
            attempts = await self.store.take(free, WAIT)
        except Unavailable:
            self.taking = False
            await self.clock.sleep(self.poll)
            return
        except Exception as error:
            emit("loop.failed", loop="taking", error=f"{type(error).__name__}: {error}")
            await self.clock.sleep(self.poll)
            return
        if attempts:
            self.start(attempts)
        self.reached()

    def _answered(self, task: asyncio.Task[None]) -> None:
        del self._open[task]
        self.wake.set()
