"""Supervisor: starts, watches and drains all loops of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

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


class Liveness:
    """`ticks` return the monotonic time of each loop's last iteration.

    `resting` says whether a drain has stopped the loops, `status` describes the worker in one line.
    """

    def __init__(
        self,
        ticks: Mapping[str, Callable[[], float]],
        notifier: Notifier,
        clock: Clock,
        *,
        resting: Callable[[], bool],
        status: Callable[[], str],
    ) -> None:
        self._ticks = ticks
        self._notifier = notifier
        self._clock = clock
        self._status = status
        self.resting = resting

    def ages(self) -> dict[str, float]:
        """Seconds since the last iteration of each loop."""
        now = self._clock.monotonic()
        return {name: now - ticked_at() for name, ticked_at in self._ticks.items()}

    def stalled(self) -> list[str]:
        """The loops that do not iterate, though they should."""
        return [name for name, age in self.ages().items() if age > PATIENCE and not self.resting()]

    async def run(self) -> None:
        """Report the status to the service manager, and feed its watchdog while no loop is stalled."""
        interval = self._notifier.watchdog_seconds
        while True:
            self._notifier.status(self._status())
            if not self.stalled():
                self._notifier.alive()
            await self._clock.sleep(PATIENCE if interval is None else interval / 3)


class Supervisor:
    """Starts the loops, restarts those that fail, and drains them in order.

    `intake` are the loops that bring work in, which a drain stops first; `outlet` those that must run
    until the last end is written. `on_draining` gets the number of running attempts.
    """

    def __init__(
        self,
        *,
        intake: Mapping[str, Loop],
        outlet: Mapping[str, Loop],
        dispatcher: Dispatcher,
        run_log: RunLogWriter,
        heartbeat: Heartbeat,
        housekeeping: Housekeeping,
        clock: Clock,
        drain: timedelta,
        on_draining: Callable[[int], None],
    ) -> None:
        self._intake = intake
        self._outlet = outlet
        self._dispatcher = dispatcher
        self._run_log = run_log
        self._heartbeat = heartbeat
        self._housekeeping = housekeeping
        self._clock = clock
        self._drain = drain
        self._on_draining = on_draining
        self._stop = asyncio.Event()
        self._requests = 0
        self.lost = False

    def stop(self) -> None:
        """Drain and end; a second call gives the runs no more time."""
        self._requests += 1
        if self._requests > 1:
            self._dispatcher.request_drain(timedelta(0))
        self._stop.set()

    def give_up(self) -> None:
        """End, because the lease is lost: nothing that this incarnation writes counts any more."""
        self.lost = True
        self._stop.set()

    async def run(self) -> bool:
        """Run until stopped; returns whether the drain wrote everything."""
        outlet = [self._start(name, loop) for name, loop in self._outlet.items()]
        intake = [self._start(name, loop) for name, loop in self._intake.items()]
        self._housekeeping.start()
        self._heartbeat.start(asyncio.get_running_loop())
        try:
            await self._stop.wait()
            self._housekeeping.stop()
            await _cancel(intake)
            return await self._drained()
        finally:
            self._heartbeat.stop()
            await _cancel(outlet)

    async def _drained(self) -> bool:
        if self.lost:
            self._dispatcher.kill()
        else:
            self._on_draining(self._dispatcher.running)
        try:
            async with asyncio.timeout(self._drain.total_seconds() + LAST_FLUSH):
                await self._dispatcher.drain(timedelta(0) if self._requests > 1 else self._drain)
                await self._run_log.flush()
        except TimeoutError:
            return False
        return True

    def _start(self, name: str, loop: Loop) -> asyncio.Task[None]:
        return asyncio.create_task(self._keep_alive(name, loop), name=name)

    async def _keep_alive(self, name: str, loop: Loop) -> None:
        while True:
            try:
                await loop()
            except Unavailable:  # reported by the database itself
                await self._clock.sleep(RESTART)
            except Exception as error:
                emit("loop.failed", loop=name, error=f"{type(error).__name__}: {error}")
                await self._clock.sleep(RESTART)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until each has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
