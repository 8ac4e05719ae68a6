"""Incarnations: one after another under a lease each, until the process is asked to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.loops.supervisor import LAST_FLUSH
from worker.execution.runners.child.pool import ChildPool
from worker.ids import WorkerId
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier

EXIT_OK = 0
EXIT_TRY_LATER = 75
# Seconds until a new incarnation tries again to register.
REGISTER_AGAIN = 1.0
# Seconds for which a host tells the workers that it has stopped, and between two tries.
FAREWELL, TELL_AGAIN = 10.0, 0.5


class Runs(Protocol):
    """A worker's or a host's life under one lease."""

    async def run(self) -> int | None:
        """Run until it is asked to stop; the exit code of the process, or None if the lease was lost.

        Raises Unavailable if it cannot be registered.
        """


class Announced:
    """What the service manager and the log learn of an incarnation: that it is ready, and that it drains."""

    def __init__(self, notifier: Notifier, clock: Clock) -> None:
        self._notifier = notifier
        self._clock = clock
        self._started_at = clock.monotonic()
        self._is_ready = False

    def ready(self, worker: WorkerId, status: str) -> None:
        """It takes runs. Only the first call counts."""
        if self._is_ready:
            return
        self._is_ready = True
        self._notifier.ready(status)
        emit("worker.ready", worker=worker, seconds=round(self._clock.monotonic() - self._started_at, 3))

    def draining(self, worker: WorkerId, running: int, drain: timedelta) -> None:
        """It gives its `running` attempts this long to end."""
        seconds = drain.total_seconds()
        self._notifier.stopping(seconds + LAST_FLUSH)
        emit("worker.draining", worker=worker, running=running, seconds=seconds)


class Signals:
    """SIGTERM and SIGINT: counts the requests to stop and passes each to the current incarnation."""

    def __init__(self) -> None:
        self.count = 0
        self._stop: Callable[[], None] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def pass_to(self, stop: Callable[[], None]) -> None:
        """Call `stop` at each request from now on, and at once for each earlier one."""
        self._stop = stop
        for _ in range(self.count):
            stop()

    def _receive(self) -> None:
        self.count += 1
        if self._stop is not None:
            self._stop()


async def farewell(
    tell: Callable[[], Awaitable[object]], signals: Signals, clock: Clock, *, until: float
) -> bool:
    """Tell the workers that this incarnation has stopped; returns whether one has heard it.

    Those of a host may be restarting right now: it tells them again until then, or until a second signal.
    """
    while True:
        with suppress(Unavailable):
            await tell()
            return True
        if signals.count > 1 or clock.monotonic() + TELL_AGAIN > until:
            return False
        await clock.sleep(TELL_AGAIN)


async def run_incarnations(
    incarnate: Callable[[Signals], Runs],
    children: ChildPool,
    notifier: Notifier,
    clock: Clock,
    *,
    waiting: str,
    patient: bool = False,
) -> int:
    """Run one incarnation after another: each new one starts when its predecessor has lost its lease.

    `waiting` is the status while one cannot be registered. Unless `patient` the first one must be.

    Raises:
        Unavailable: the first incarnation cannot be registered.
    """
    signals = Signals()
    # Before the first incarnation: it must survive a zygote that dies before the first run.
    children.attach()
    try:
        exit_code = None if patient else await incarnate(signals).run()
        while exit_code is None:
            try:
                exit_code = await incarnate(signals).run()
            except Unavailable:
                # Only the registration raises this; the loops tolerate an unavailable database.
                if signals.count:
                    return EXIT_OK  # no runs, nothing unwritten
                notifier.status(waiting)
                notifier.alive()
                await clock.sleep(REGISTER_AGAIN)
        return exit_code
    finally:
        await children.close()
