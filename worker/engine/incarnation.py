"""Incarnations of a worker or a host: one after another under a lease each, until it is asked to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from random import Random, SystemRandom
from typing import Any, Literal, Protocol

from worker.clock import Clock
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops.dispatcher import Dispatcher
from worker.engine.loops.finisher import FinishStore
from worker.engine.loops.heartbeat import Heartbeat, LeaseStore
from worker.engine.loops.maintenance import Housekeeping
from worker.engine.loops.reading import CatalogueReader, CatalogueSink
from worker.engine.loops.reconciler import HandBackStore, Reconciler, Renewal
from worker.engine.loops.step_writer import StepWriter
from worker.engine.loops.supervisor import Liveness, Loop, Paced, cancel, keep_alive
from worker.engine.runners.child.pool import ChildPool
from worker.engine.signals import Signals
from worker.errors import Unavailable
from worker.ids import RunId, WorkerId
from worker.model.runs.run import Isolation, OwnedRun
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier, Vitals
from worker.threads import SYSTEM, Threads

EXIT_OK = 0
EXIT_TRY_LATER = 75
# Seconds that writing the last ends may take after the drain itself.
LAST_FLUSH = 10.0
# Seconds until a new incarnation tries again to register.
REGISTER_AGAIN = 1.0
# Seconds for which a host tells the workers that it has stopped, and between two tries.
FAREWELL = 10.0
TELL_AGAIN = 0.5


class Source(Paced, Protocol):
    """Where runs come from. Fills the free slots, again after each `wake`.

    `taking` says whether it can be given runs now.
    """

    wake: asyncio.Event
    taking: bool


class Sink(FinishStore, LeaseStore, HandBackStore, Protocol):
    """Where the ends of runs go, and who grants the lease."""


class WatchedFiles(Protocol):
    every: float

    def look(self) -> None:
        """Restore and report modes that were opened."""


class VitalsReader(Protocol):
    """Reports the health of the process."""

    def starting(self) -> None:
        """No incarnation runs."""

    def watch(self, vitals: Vitals) -> None:
        """Report these from now on."""


class StopRequests:
    """SIGTERM and SIGINT: counts the requests to stop and passes each to the current incarnation."""

    def __init__(self) -> None:
        self.count = 0
        self._stop: Callable[[], None] | None = None

    def listen(self) -> None:
        """Receive the signals of this process on the running loop."""
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


@dataclass(eq=False, repr=False)
class ProcessTools:
    """What the incarnations of a worker or host share. `farewell` is in seconds, at most.

    Child processes read the catalogue by the command `describe`, with `pass_environment`.
    """

    kind: Literal["worker", "host"]
    children: ChildPool
    notifier: Notifier
    clock: Clock
    health: VitalsReader
    files: WatchedFiles
    slots: Mapping[Isolation, int]
    drain: timedelta
    pass_environment: Sequence[str] = ()
    describe: Sequence[str] = ()
    farewell: float = 0.0
    random: Random = field(default_factory=SystemRandom)
    threads: Threads = SYSTEM
    requests: StopRequests = field(default_factory=StopRequests)
    started_at: float = 0.0

    def broker_fault(self) -> str | None:
        """Why no broker is up; then no runs are taken, since their requests would wait."""
        broker = self.children.broker
        return None if broker is None else broker.fault

    def starting(self) -> None:
        """Begin the next incarnation."""
        self.health.starting()
        self.started_at = self.clock.monotonic()


@dataclass(eq=False, repr=False)
class Incarnation:
    """The life of a worker or host under one lease, after it was registered.

    `loops` bring work in and are watched, and `source` is one of them; those in `intake` are not watched. A
    drain ends all of these first. Then `resources` are closed, and `leave` tells that the lease is given up.
    """

    process: ProcessTools
    id: WorkerId
    sink: Sink
    source: Source
    loops: Mapping[str, Paced]
    dispatcher: Dispatcher[Any]
    steps: StepWriter
    handlers: HandlerRegistry
    catalogue: CatalogueSink
    signals: Signals
    lease: timedelta
    renew: float
    leave: Callable[[], Awaitable[object]]
    cancel: Callable[[RunId, str], None]
    is_placed: Callable[[OwnedRun], bool] = lambda run: False
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    intake: dict[str, Loop] = field(default_factory=dict)
    housekeeping: Housekeeping = field(default_factory=Housekeeping)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _stops: int = 0
    _stopping_at: float | None = None
    _lost: bool = False
    _is_ready: bool = False

    def __post_init__(self) -> None:
        process, clock, inflight_runs = self.process, self.process.clock, self.dispatcher.inflight_runs
        on_lease = process.children.renewed
        self._reconciler = Reconciler(
            inflight_runs, self.sink, self.cancel, on_lease, on_lost=self._give_up, is_placed=self.is_placed
        )
        self._heartbeat = Heartbeat(
            self.sink,
            inflight_runs,
            clock,
            self.lease,
            self.renew,
            on_lease,
            on_renewal=self._renewed,
            threads=process.threads,
        )
        self._liveness = Liveness(
            self.loops, process.notifier, clock, resting=self._resting, status=self._status
        )
        self._vitals = Vitals(
            ages=self._liveness.ages,
            stalled=self._liveness.stalled,
            lease_remaining=lambda: self._heartbeat.lease.expires_at - clock.monotonic(),
            admitting=lambda: self.source.taking,
            draining=self._resting,
            slots={str(isolation): count for isolation, count in process.slots.items()},
            used=inflight_runs.used,
            broker_fault=process.broker_fault,
        )
        process.health.watch(self._vitals)
        # After an outage, runs are taken only once the lease is renewed.
        for each in (self.signals.runs_due, self.signals.slots_free, self.signals.lease_answered):
            each.calls(self.source.wake.set)
        self.signals.handlers_changed.calls(self.signals.runs_due)
        self.signals.ready.calls(self._ready)
        files = process.files
        self.housekeeping.every(files.every, "files", partial(asyncio.to_thread, files.look))

    def may_recover(self) -> bool:
        """Whether contact has lasted for a whole lease, so that living owners have renewed first."""
        return self._heartbeat.may_recover()

    async def run(self) -> int | None:
        """Run until SIGTERM or SIGINT; returns the exit code: 0, or 75 if not everything could be written.

        Returns None if the lease was lost: others own the runs, and only a new incarnation may take more.
        """
        process = self.process
        process.requests.pass_to(self.stop)
        try:
            written = await self._supervise()
        finally:
            await self.resources.aclose()
        if self._lost and not process.requests.count:
            return None
        # If this fails, the lease expires.
        await farewell(self.leave, process.requests, process.clock, until=self._farewell_until())
        exit_code = EXIT_OK if written else EXIT_TRY_LATER
        emit(f"{process.kind}.stopped", worker=self.id, exit_code=exit_code)
        return exit_code

    def stop(self) -> None:
        """Drain and end; a second call gives the runs no more time."""
        self._stops += 1
        if self._stops > 1:
            self.dispatcher.request_drain(timedelta(0))
        self._stop.set()

    async def _supervise(self) -> bool:
        """Run the loops until stopped; returns whether the drain wrote everything."""
        reader = CatalogueReader(
            self.catalogue,
            self.handlers,
            on_offered=self.signals.handlers_changed,
            pass_environment=self.process.pass_environment,
            command=self.process.describe,
            describing=self.process.children.take_describing,
            on_read=self.signals.catalogue_read,
        )
        outlet = self._start(
            {
                "finisher": self.dispatcher.finisher.run,
                "steps": self.steps.run,
                "journal": self.dispatcher.tools.run_log.run,
                "reconciler": self._reconciler.run,
                "pulse": self._liveness.run,
            }
        )
        watched = {name: loop.run for name, loop in self.loops.items()}
        intake = self._start({**watched, **self.intake, "catalogue": reader.run})
        self.housekeeping.start()
        self._heartbeat.start(asyncio.get_running_loop())
        try:
            await self._stop.wait()
            self.housekeeping.pause()
            await cancel(intake)
            written = await self._drained()
            if self._stops < 2:
                await self.housekeeping.finish()
            return written
        finally:
            self.housekeeping.stop()
            self._heartbeat.stop()
            await cancel(outlet)

    def _start(self, loops: Mapping[str, Loop]) -> list[asyncio.Task[None]]:
        clock = self.process.clock
        return [asyncio.create_task(keep_alive(*loop, clock), name=loop[0]) for loop in loops.items()]

    async def _drained(self) -> bool:
        drain = self.process.drain
        if self._lost:
            self.dispatcher.kill()
        else:
            self._announce_drain(drain.total_seconds())
        try:
            async with asyncio.timeout(drain.total_seconds() + LAST_FLUSH):
                await self.dispatcher.drain(timedelta(0) if self._stops > 1 else drain)
                await self.dispatcher.tools.run_log.flush()
        except TimeoutError:
            return False
        return True

    def _announce_drain(self, seconds: float) -> None:
        self._stopping_at = self.process.clock.monotonic()
        self.signals.draining()
        self.process.notifier.stopping(seconds + LAST_FLUSH)
        emit("worker.draining", worker=self.id, running=self.dispatcher.running, seconds=seconds)

    def _ready(self) -> None:
        """The source gives runs. Only the first call counts."""
        if not self._is_ready:
            self._is_ready = True
            self.process.notifier.ready(self._status())
            seconds = self.process.clock.monotonic() - self.process.started_at
            emit("worker.ready", worker=self.id, seconds=round(seconds, 3))

    def _renewed(self, renewal: Renewal) -> None:
        self._reconciler.take(renewal)
        self.signals.lease_answered()

    def _give_up(self) -> None:
        """End, because the lease is lost: nothing that this incarnation writes counts any more."""
        self._lost = True
        self._stop.set()

    def _resting(self) -> bool:
        return self.process.requests.count > 0

    def _status(self) -> str:
        return self._vitals.in_words()

    def _farewell_until(self) -> float:
        """When to give up the farewell: the service manager allows the drain and `LAST_FLUSH`."""
        now = self.process.clock.monotonic()
        allowed = (self._stopping_at or now) + self.process.drain.total_seconds() + LAST_FLUSH
        return min(now + self.process.farewell, allowed)


async def farewell(
    tell: Callable[[], Awaitable[object]], requests: StopRequests, clock: Clock, *, until: float
) -> bool:
    """Tell that this incarnation has stopped, at least once; returns whether it was heard.

    The workers of a host may be restarting: it tells them again until then, or until a second signal.
    """
    while True:
        with suppress(Unavailable):
            await tell()
            return True
        if requests.count > 1 or clock.monotonic() + TELL_AGAIN > until:
            return False
        await clock.sleep(TELL_AGAIN)


async def run_incarnations(
    begin: Callable[[], AbstractAsyncContextManager[Incarnation]],
    process: ProcessTools,
    *,
    waiting: str,
    patient: bool = False,
) -> int:
    """Run one incarnation after another: each new one starts when its predecessor has lost its lease.

    `begin` registers one. `waiting` is the status while that is not possible. Unless `patient` the first one
    must be.

    Raises:
        Unavailable: the first incarnation cannot be registered.
    """
    process.requests.listen()
    # Before the first incarnation: it must survive a zygote that dies before the first run.
    process.children.attach()
    try:
        exit_code = None if patient else await _live(begin, process)
        while exit_code is None:
            try:
                exit_code = await _live(begin, process)
            except Unavailable:
                # Only the registration raises this; the loops tolerate an unavailable database.
                if process.requests.count:
                    return EXIT_OK  # no runs, nothing unwritten
                process.notifier.status(waiting)
                process.notifier.alive()
                await process.clock.sleep(REGISTER_AGAIN)
        return exit_code
    finally:
        await process.children.close()


async def _live(
    begin: Callable[[], AbstractAsyncContextManager[Incarnation]], process: ProcessTools
) -> int | None:
    process.starting()
    async with begin() as incarnation:
        return await incarnation.run()
