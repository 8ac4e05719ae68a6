"""Loops: all that carries a definition to its outcome, in one process, started and drained together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.carrier import Carrier
from worker.execution.heartbeat import Heartbeat
from worker.execution.housekeeping import Housekeeping
from worker.execution.journal import Journal
from worker.telemetry.events import emit

Loop = Callable[[], Awaitable[None]]

# Seconds before a loop that failed is started again.
RESTART = 1.0
# Seconds that the last ends may take to be written, beyond the drain itself.
LAST_FLUSH = 10.0


class Loops:
    """Starts the loops, keeps each alive, and drains them in order.

    `intake` are the loops that bring work in (fire, admit, recover), which a drain
    ends first; `outlet` those that must go on until the last end is written.
    `on_draining` is told how many runs are on.
    """

    def __init__(
        self,
        *,
        intake: Mapping[str, Loop],
        outlet: Mapping[str, Loop],
        carrier: Carrier,
        journal: Journal,
        heartbeat: Heartbeat,
        housekeeping: Housekeeping,
        clock: Clock,
        drain: timedelta,
        on_draining: Callable[[int], None],
    ) -> None:
        self._intake = intake
        self._outlet = outlet
        self._carrier = carrier
        self._journal = journal
        self._heartbeat = heartbeat
        self._housekeeping = housekeeping
        self._clock = clock
        self._drain = drain
        self._on_draining = on_draining
        self._stop = asyncio.Event()
        self._asked = 0
        self.lost = False

    def stop(self) -> None:
        """Drain and end; asked a second time, give the runs no more time."""
        self._asked += 1
        if self._asked > 1:
            self._carrier.hurry(timedelta(0))
        self._stop.set()

    def give_up(self) -> None:
        """The lease is lost: end, since nothing that this incarnation writes counts any more."""
        self.lost = True
        self._stop.set()

    async def run(self) -> bool:
        """Run until stopped; whether the drain left nothing unwritten."""
        outlet = [self._start(name, loop) for name, loop in self._outlet.items()]
        intake = [self._start(name, loop) for name, loop in self._intake.items()]
        self._housekeeping.start()
        self._heartbeat.start(asyncio.get_running_loop())
        try:
            await self._stop.wait()
            self._housekeeping.stop()
            await ended(intake)
            return await self._drained()
        finally:
            self._heartbeat.stop()
            await ended(outlet)

    async def _drained(self) -> bool:
        if self.lost:
            self._carrier.kill()
        else:
            self._on_draining(self._carrier.running)
        try:
            async with asyncio.timeout(self._drain.total_seconds() + LAST_FLUSH):
                await self._carrier.drain(timedelta(0) if self._asked > 1 else self._drain)
                await self._journal.flush()
        except TimeoutError:
            return False
        return True

    def _start(self, name: str, loop: Loop) -> asyncio.Task[None]:
        return asyncio.create_task(self._kept_alive(name, loop), name=name)

    async def _kept_alive(self, name: str, loop: Loop) -> None:
        """One loop that fails is told and started again; the others never notice."""
        while True:
            try:
                await loop()
            except Unavailable:
                # The database is away, which is told where it is asked; the loop begins again.
                await self._clock.sleep(RESTART)
            except Exception as error:
                emit("loop.failed", loop=name, error=f"{type(error).__name__}: {error}")
                await self._clock.sleep(RESTART)


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until each is gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
