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

# A loop that has not come round for this many seconds does not tick.
PATIENCE = 15.0


class Liveness:
    """`ticks` give, by loop, the monotonic instant at which it last came round.

    `resting` says that a drain has ended them on purpose, `status` in one line how the worker is.
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
        """Seconds since each loop last came round."""
        now = self._clock.monotonic()
        return {name: now - ticked_at() for name, ticked_at in self._ticks.items()}

    def stalled(self) -> list[str]:
        """The loops that do not tick, though they should."""
        return [name for name, age in self.ages().items() if age > PATIENCE and not self.resting()]

    async def run(self) -> None:
        """Feed the service manager's watchdog as long as every loop ticks, and tell it how things are.

        Ends by cancellation only.
        """
        interval = self._notifier.watchdog_seconds
        while True:
            self._notifier.status(self._status())
            if not self.stalled():
                self._notifier.alive()
            await self._clock.sleep(PATIENCE if interval is None else interval / 3)


Loop = Callable[[], Awaitable[None]]

# Seconds before a loop that failed is started again.
RESTART = 1.0
# Seconds that the last ends may take to be written, beyond the drain itself.
LAST_FLUSH = 10.0


class Supervisor:
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
        carrier: Dispatcher,
        journal: RunLogWriter,
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
