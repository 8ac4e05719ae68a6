"""A host: runs handlers for the workers in `[host] control`, without the database and the key ring."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from random import SystemRandom
from typing import TYPE_CHECKING, Any

from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, Unavailable
from worker.execution.attempts import events as attempt_events
from worker.execution.attempts.dispatcher import Dispatcher
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRuns
from worker.execution.hosts.control import AsyncControl, BlockingControl, ControlDenied, Controls
from worker.execution.hosts.hosted import RemoteTools, hosted_attempt
from worker.execution.hosts.remote import RemoteStore
from worker.execution.hosts.taking import Taking
from worker.execution.hosts.wire import Registered, Registration, Taken
from worker.execution.incarnation import (
    EXIT_OK,
    EXIT_TRY_LATER,
    FAREWELL,
    Announced,
    Signals,
    farewell,
    run_incarnations,
)
from worker.execution.loops.heartbeat import Heartbeat
from worker.execution.loops.maintenance import Housekeeping
from worker.execution.loops.reading import CatalogueReader
from worker.execution.loops.reconciler import Reconciler, Renewal
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.loops.step_writer import StepWriter
from worker.execution.loops.supervisor import LAST_FLUSH, Liveness, Supervisor
from worker.execution.runners.child.pool import SHARE_AFTER, ChildPool
from worker.execution.runners.inline import Inline
from worker.ids import WorkerId
from worker.operations.confinement import Confinement, confinement_of
from worker.operations.guarded_files import FileWatch
from worker.operations.host_access import read_token, trusting
from worker.runs.run import Isolation
from worker.settings import Settings
from worker.telemetry import events, logs
from worker.telemetry.events import emit
from worker.telemetry.metrics import Metrics
from worker.telemetry.vitals import Notifier, Vitals
from worker.web.connections import Connections
from worker.web.health import Health
from worker.web.listener import WebServer, bind, build_health
from worker.wiring.temporal import place_of, require_client, tls_of
from worker.wiring.traces import traces_of

if TYPE_CHECKING:
    from worker.execution.hosts.tickets import TicketTaking

VERSION = version("orgworker")
# The share of the lease that a renewal waits for its answer: two tries fit in before the runs freeze.
PATIENCE = 0.3
# Seconds for which a thread keeps the interpreter, as in a worker.
SWITCH = 0.0001


def run(settings: Settings, *, pool: str | None = None) -> int:
    """Run a host until SIGTERM or SIGINT; returns the exit code of the process.

    With `pool` it refuses to serve another one.

    Raises:
        Busy: another process uses the port of `[web] health_listen`.
        ConfigurationError: the token or a certificate cannot be used, or the sandbox is not available.
    """
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    traces = traces_of(settings.tracing, clock, version=VERSION)
    notifier = Notifier()
    confinement = confinement_of(settings)
    confinement.warn()
    execution = settings.execution
    metrics = Metrics(version=VERSION, on_host=True)
    events.listen(metrics.take)
    health = Health(metrics, sandbox=confinement.level)
    context = trusting(settings.host.ca_file)
    web = _health_server(settings, health, clock)
    children = ChildPool(
        clock,
        max_freeze=execution.max_freeze,
        preload=execution.preload,
        pass_environment=execution.pass_environment,
        sandbox=confinement.rules,
        spares=min(execution.spare_children, execution.max_children),
        share_after=SHARE_AFTER,
        describes=True,
    )
    children.start()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    sys.setswitchinterval(SWITCH)
    # From here on this process holds the host's token, and nothing is forked from it.
    try:
        token = read_token(settings.host.token_file)
    except ConfigurationError:
        asyncio.run(children.close())
        raise
    controls = Controls(settings.host.control, token, clock, context=context)

    files = FileWatch(settings, clock)

    def incarnate(signals: Signals) -> HostIncarnation:
        given = (settings, controls, children, notifier, signals, clock, health)
        return HostIncarnation(*given, confinement, files, pool)

    async def serve() -> int:
        with traces:
            async with web:
                return await run_incarnations(
                    incarnate,
                    children,
                    notifier,
                    clock,
                    waiting="waiting for a worker in [host] control",
                    patient=True,
                )

    return asyncio.run(serve())


def _health_server(settings: Settings, health: Health, clock: Clock) -> AbstractAsyncContextManager[None]:
    listen = settings.web.health_listen
    if not listen:
        return contextlib.nullcontext()
    listener = bind(listen, "[web] health_listen")
    return WebServer(build_health(health), listen, listener, clock, connections=Connections(100)).serving()


@dataclass
class HostIncarnation:
    """A host's life under one lease: its loops and what they share."""

    settings: Settings
    controls: Controls
    children: ChildPool
    notifier: Notifier
    signals: Signals
    clock: Clock
    health: Health
    confinement: Confinement
    files: FileWatch
    pool: str | None
    id: WorkerId = field(default=WorkerId(""), init=False)
    _stopping_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.health.starting()
        self._announced = Announced(self.notifier, self.clock)
        execution = self.settings.execution
        self._slots: dict[Isolation, int] = {
            "child": execution.max_children,
            "inline": execution.max_inline,
        }
        self._inflight_runs = InflightRuns()
        self._handlers = HandlerRegistry(frozenset(execution.inline))

    async def run(self) -> int | None:
        """Run until SIGTERM or SIGINT; returns the exit code: 0, or 75 if not everything could be written.

        Returns None if the lease was lost. Raises Unavailable if no worker answers at the start.
        """
        control = AsyncControl(self.controls)
        heartbeat = BlockingControl(self.controls, PATIENCE)
        try:
            await asyncio.to_thread(self.files.look)
            store = RemoteStore(control, heartbeat, self._inflight_runs, self.clock.now)
            registered = await self._register(store)
            heartbeat.deadline = PATIENCE * registered.lease
            supervisor = self._assemble(store, registered)
            self.children.attach()
            self.signals.pass_to(supervisor.stop)
            unwritten = not await supervisor.run()
            if supervisor.lost and not self.signals.count:
                return None
            # If no worker answers in time, the lease expires, and the host counts as silent.
            await farewell(
                partial(self._unregister, store), self.signals, self.clock, until=self._stop_until()
            )
        finally:
            await control.aclose()
            heartbeat.close()
        exit_code = EXIT_TRY_LATER if unwritten else EXIT_OK
        emit("host.stopped", worker=self.id, exit_code=exit_code)
        return exit_code

    async def _register(self, store: RemoteStore) -> Registered:
        """Start the incarnation at a worker. Raises Unavailable, and ConfigurationError."""
        self.controls.incarnation = ""
        registration = Registration(
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            slots=self._slots,
        )
        try:
            registered = await store.register(registration)
        except ControlDenied as error:
            raise ConfigurationError(
                f"the workers do not accept this host: {error.message}", fix=error.fix
            ) from None
        self.id = WorkerId(registered.worker)
        self.controls.incarnation = registered.worker
        if self.pool not in (None, registered.pool):
            with suppress(Unavailable):
                await store.unregister()
            raise ConfigurationError(
                f"--pool {self.pool}: the token in {self.settings.host.token_file} is for the pool "
                f"{registered.pool}",
                fix=f"use a token of `hosts add NAME --pool {self.pool}`, or leave --pool out",
            )
        emit(
            "host.started",
            worker=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            pool=registered.pool,
        )
        return registered

    async def _unregister(self, store: RemoteStore) -> None:
        try:
            await store.hand_back_rest()
            await store.unregister()
        except ControlDenied:
            # The host was removed, or got another pool: the row has ended.
            return

    def _stop_until(self) -> float:
        """When to give up the farewell: the service manager allows the drain and `LAST_FLUSH`."""
        now = self.clock.monotonic()
        drain = self.settings.execution.drain.total_seconds()
        return min(now + FAREWELL, (self._stopping_at or now) + drain + LAST_FLUSH)

    def _assemble(self, store: RemoteStore, registered: Registered) -> Supervisor:
        execution, clock, inflight_runs = self.settings.execution, self.clock, self._inflight_runs
        run_log, steps = RunLogWriter(store, clock), StepWriter(store, clock)
        tools = RemoteTools(
            store=store,
            handlers=self._handlers,
            runners={"child": self.children, "inline": Inline(clock)},
            steps=steps,
            run_log=run_log,
            clock=clock,
            random=SystemRandom(),
        )

        def wake_taking() -> None:
            taking.wake.set()

        def start(attempts: Sequence[Taken]) -> None:
            dispatcher.start(tools.keep(attempts))

        dispatcher = Dispatcher(
            tools,
            hosted_attempt,
            inflight_runs,
            store,
            on_free=wake_taking,
            on_end=lambda ended, inflight: None,
            report=attempt_events.attempt_ended,
        )

        def on_taking() -> None:
            self._announced.ready(self.id, vitals.in_words())

        common: dict[str, Any] = {
            "slots": self._slots,
            "poll": registered.poll,
            "offers": lambda: bool(self._handlers.names()),
            "start": start,
            "on_taking": on_taking,
        }
        taking: Taking | TicketTaking
        if registered.temporal is None:
            taking = Taking(store, inflight_runs, clock, **common)
        else:
            require_client(f"the runs of pool {registered.pool} come from Temporal")
            from worker.execution.hosts.tickets import TicketTaking

            place = place_of(registered.temporal, self.settings.temporal)
            taking = TicketTaking(
                store,
                inflight_runs,
                clock,
                registered.pool,
                place,
                tls_of(self.settings.temporal, tls=place.tls),
                f"orgworker host {self.id}",
                **common,
            )
        reconciler = Reconciler(
            inflight_runs,
            store,
            cancel=dispatcher.cancel,
            on_lease=self.children.renewed,
            on_lost=lambda: supervisor.give_up(),
        )

        def on_renewal(renewal: Renewal) -> None:
            reconciler.take(renewal)
            taking.reached()
            taking.wake.set()

        heartbeat = Heartbeat(
            store,
            inflight_runs,
            clock,
            duration=timedelta(seconds=registered.lease),
            renew=registered.renew,
            on_lease=self.children.renewed,
            on_renewal=on_renewal,
        )
        liveness = Liveness(
            {"taking": lambda: taking.ticked_at},
            self.notifier,
            clock,
            resting=lambda: self.signals.count > 0,
            status=lambda: vitals.in_words(),
        )
        vitals = Vitals(
            ages=liveness.ages,
            stalled=liveness.stalled,
            lease_remaining=lambda: heartbeat.lease.expires_at - clock.monotonic(),
            admitting=lambda: taking.taking,
            draining=liveness.resting,
            slots={str(isolation): count for isolation, count in self._slots.items()},
            used=inflight_runs.used,
        )
        self.health.watch(vitals)
        catalogue = CatalogueReader(
            store,
            self._handlers,
            on_offered=wake_taking,
            pass_environment=execution.pass_environment,
            command=self.confinement.describe,
            describing=self.children.take_describing,
        )
        housekeeping = Housekeeping()
        housekeeping.every(self.files.every, "files", partial(asyncio.to_thread, self.files.look))
        supervisor = Supervisor(
            intake={"taking": taking.run, "catalogue": catalogue.run},
            outlet={
                "finisher": dispatcher.finisher.run,
                "steps": steps.run,
                "journal": run_log.run,
                "reconciler": reconciler.run,
                "pulse": liveness.run,
            },
            dispatcher=dispatcher,
            run_log=run_log,
            heartbeat=heartbeat,
            housekeeping=housekeeping,
            clock=clock,
            drain=execution.drain,
            on_draining=self._draining,
        )
        return supervisor

    def _draining(self, running: int) -> None:
        self._stopping_at = self.clock.monotonic()
        self._announced.draining(self.id, running, self.settings.execution.drain)
