"""Supervisor: starts, watches and drains all loops of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.attempts.dispatcher import Dispatcher
from worker.execution.loops.heartbeat import Heartbeat
from worker.execution.loops.maintenance import Housekeeping
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier

# Seconds without an iteration after which a loop counts as stalled.
PATIENCE = 15.0
# Seconds before a loop that failed is started again.
RESTART = 1.0
# Seconds that writing the last ends may take after the drain itself.
LAST_FLUSH = 10.0

Loop = Callable[[], Awaitable[None]]


@dataclass(eq=False, repr=False)
class Liveness:
    """`ticks` return the monotonic time of each loop's last iteration.

    `resting` says whether a drain has stopped the loops, `status` describes the worker in one line.
    """

    ticks: Mapping[str, Callable[[], float]]
    notifier: Notifier
    clock: Clock
    resting: Callable[[], bool]
    status: Callable[[], str]

    def ages(self) -> dict[str, float]:
        """Seconds since the last iteration of each loop."""
        now = self.clock.monotonic()
        return {name: now - ticked_at() for name, ticked_at in self.ticks.items()}

    def stalled(self) -> list[str]:
        """The loops that do not iterate, though they should."""
        return [name for name, age in self.ages().items() if age > PATIENCE and not self.resting()]

    async def run(self) -> None:
        """Report the status to the service manager, and feed its watchdog while no loop is stalled."""
        interval = self.notifier.watchdog_seconds
        while True:
            self.notifier.status(self.status())
            if not self.stalled():
                self.notifier.alive()
            await self.clock.sleep(PATIENCE if interval is None else interval / 3)


@dataclass(eq=False, repr=False)
class Supervisor:
    """Starts the loops, restarts those that fail, and drains them in order.

    `intake` are the loops that bring work in, which a drain stops first; `outlet` those that must run
    until the last end is written. `on_draining` gets the number of running attempts.
    """

    intake: Mapping[str, Loop]
    outlet: Mapping[str, Loop]
    dispatcher: Dispatcher[Any]
    run_log: RunLogWriter
    heartbeat: Heartbeat
    housekeeping: Housekeeping
    clock: Clock
    drain: timedelta
    on_draining: Callable[[int], None]
    lost: bool = False
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _requests: int = 0

    def stop(self) -> None:
        """Drain and end; a second call gives the runs no more time."""
        self._requests += 1
        if self._requests > 1:
            self.dispatcher.request_drain(timedelta(0))
        self._stop.set()

    def give_up(self) -> None:
        """End, because the lease is lost: nothing that this incarnation writes counts any more."""
        self.lost = True
        self._stop.set()

    async def run(self) -> bool:
        """Run until stopped; returns whether the drain wrote everything."""
        outlet, intake = self._start(self.outlet), self._start(self.intake)
        self.housekeeping.start()
        self.heartbeat.start(asyncio.get_running_loop())
        try:
            await self._stop.wait()
            self.housekeeping.stop()
            await _cancel(intake)
            return await self._drained()
        finally:
            self.heartbeat.stop()
            await _cancel(outlet)

    async def _drained(self) -> bool:
        if self.lost:
            self.dispatcher.kill()
        else:
            self.on_draining(self.dispatcher.running)
        try:
            async with asyncio.timeout(self.drain.total_seconds() + LAST_FLUSH):
                await self.dispatcher.drain(timedelta(0) if self._requests > 1 else self.drain)
                await self.run_log.flush()
        except TimeoutError:
            return False
        return True

    def _start(self, loops: Mapping[str, Loop]) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._keep_alive(*loop), name=loop[0]) for loop in loops.items()]

    async def _keep_alive(self, name: str, loop: Loop) -> None:
        while True:
            try:
                await loop()
            except Unavailable:  # reported by the database itself
                await self.clock.sleep(RESTART)
            except Exception as error:
                emit("loop.failed", loop=name, error=f"{type(error).__name__}: {error}")
                await self.clock.sleep(RESTART)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
