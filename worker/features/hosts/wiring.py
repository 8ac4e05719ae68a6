"""A host: runs handlers for the workers in `[host] control`, without the database and the key ring."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from worker.clock import Clock, SystemClock
from worker.engine.attempt.inflight import InflightRuns, attempt_ended
from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.incarnation import FAREWELL, Incarnation, ProcessTools, Source, run_incarnations
from worker.engine.loops.dispatcher import Dispatcher
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.inline import Inline
from worker.engine.signals import Signals
from worker.errors import ConfigurationError, Unavailable
from worker.features.hosts.access import token_of, trusting
from worker.features.hosts.control import AsyncControl, BlockingControl, ControlDenied, Controls
from worker.features.hosts.hosted import RemoteTools, hosted_attempt
from worker.features.hosts.remote import RemoteStore
from worker.features.hosts.taking import Taking
from worker.features.hosts.temporal.connection import place_of, require_client, tls_of
from worker.features.hosts.wire import Registered, Registration, Taken
from worker.ids import WorkerId
from worker.kit.broker import broker_of
from worker.kit.web.connections import Connections
from worker.kit.web.health import Health
from worker.kit.web.listener import WebServer, bind, build_health
from worker.process.confinement import confinement_of, network_of
from worker.settings import Settings
from worker.telemetry import events, logs
from worker.telemetry.events import emit
from worker.telemetry.metrics import Metrics
from worker.telemetry.vitals import Notifier
from worker.wiring.start import VERSION, start
from worker.wiring.traces import traces_of

COLLECT = (100_000, 20, 50)
# The share of the lease that a renewal waits for its answer: two tries fit in before the runs freeze.
PATIENCE = 0.3


def run(settings: Settings, *, pool: str | None = None) -> int:
    """Run a host until SIGTERM or SIGINT; returns the exit code of the process.

    With `pool` it refuses to serve another one.

    Raises:
        Busy: another process uses the port of `[web] health_listen`.
        ConfigurationError: the token or a certificate cannot be used, or the sandbox is not available.
    """
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    content = settings.telemetry.record_content
    traces = traces_of(settings.tracing, clock, version=VERSION, record_content=content)
    notifier = Notifier()
    confinement = confinement_of(settings)
    confinement.warn()
    metrics = Metrics(version=VERSION, on_host=True)
    events.listen(metrics.take)
    health = Health(metrics, sandbox=confinement.level)
    context = trusting(settings.host.ca_file)
    web = _health_server(settings, health, clock)
    given = (settings, clock, notifier, health, confinement, broker_of(settings, clock, confinement))
    process = start("host", *given, collect=COLLECT, farewell=FAREWELL)
    # From here on this process holds the host's token, and nothing is forked from it.
    try:
        token = token_of(settings.host)
    except ConfigurationError:
        asyncio.run(process.children.close())
        raise
    controls = Controls(settings.host.control, token, clock, context=context)
    host = Host(settings, controls, process, pool)

    async def serve() -> int:
        with traces:
            async with web:
                return await run_incarnations(
                    host.begin, process, waiting="waiting for a worker in [host] control", patient=True
                )

    return asyncio.run(serve())


def _health_server(settings: Settings, health: Health, clock: Clock) -> AbstractAsyncContextManager[None]:
    listen = settings.web.health_listen
    if not listen:
        return contextlib.nullcontext()
    listener = bind(listen, "[web] health_listen")
    return WebServer(build_health(health), listen, listener, clock, connections=Connections(100)).serving()


@dataclass
class Host:
    """Puts together the incarnations of a host, each for the pool of its token."""

    settings: Settings
    controls: Controls
    process: ProcessTools
    pool: str | None

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Incarnation]:
        """Register an incarnation and put it together. Raises Unavailable if no worker answers."""
        control, heartbeat = AsyncControl(self.controls), BlockingControl(self.controls, PATIENCE)
        try:
            await asyncio.to_thread(self.process.files.look)
            store = RemoteStore(control, heartbeat, InflightRuns(), self.process.clock.now)
            registered = await self._register(store)
            heartbeat.deadline = PATIENCE * registered.lease
            yield self._assemble(store, registered)
        finally:
            await control.aclose()
            heartbeat.close()

    async def _register(self, store: RemoteStore) -> Registered:
        """Start the incarnation at a worker. Raises Unavailable, and ConfigurationError."""
        self.controls.incarnation = ""
        registration = Registration(
            host=socket.gethostname(), pid=os.getpid(), version=VERSION, slots=self.process.slots
        )
        try:
            registered = await store.register(registration)
        except ControlDenied as error:
            raise ConfigurationError(
                f"the workers do not accept this host: {error.message}", fix=error.fix
            ) from None
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
            worker=registered.worker,
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

    def _assemble(self, store: RemoteStore, registered: Registered) -> Incarnation:
        process, clock, inflight_runs = self.process, self.process.clock, store.inflight_runs
        signals, steps = Signals(), StepWriter(store, clock)
        handlers = HandlerRegistry(frozenset(self.settings.execution.inline))
        tools = RemoteTools(
            store=store,
            handlers=handlers,
            runners={"child": process.children, "inline": Inline(clock, broker=process.children.broker)},
            steps=steps,
            run_log=RunLogWriter(store, clock),
            clock=clock,
            random=process.random,
            brokered=process.children.broker is not None,
            network=network_of(self.settings),
        )
        dispatcher = Dispatcher(
            tools,
            hosted_attempt,
            inflight_runs,
            tools,
            on_free=signals.slots_free,
            on_end=lambda ended, inflight: None,
            report=attempt_ended,
        )
        taking = self._source(store, registered, dispatcher, signals)
        return Incarnation(
            process=process,
            id=WorkerId(registered.worker),
            sink=store,
            source=taking,
            loops={"taking": taking},
            dispatcher=dispatcher,
            steps=steps,
            handlers=handlers,
            catalogue=store,
            signals=signals,
            lease=timedelta(seconds=registered.lease),
            renew=registered.renew,
            leave=partial(self._unregister, store),
            cancel=dispatcher.cancel,
        )

    def _source(
        self,
        store: RemoteStore,
        registered: Registered,
        dispatcher: Dispatcher[RemoteTools],
        signals: Signals,
    ) -> Source:
        clock, tools, pool = self.process.clock, dispatcher.tools, registered.pool

        def offers() -> bool:
            return bool(tools.handlers.names()) and self.process.broker_fault() is None

        def start(attempts: Sequence[Taken]) -> None:
            dispatcher.start(tools.keep(attempts))

        common: dict[str, Any] = {
            "slots": self.process.slots,
            "poll": registered.poll,
            "offers": offers,
            "start": start,
            "on_taking": signals.ready,
        }
        if registered.temporal is None:
            taking = Taking(store, store.inflight_runs, clock, **common)
            signals.lease_answered.calls(taking.reached)
            return taking
        require_client(f"the runs of pool {pool} come from Temporal")
        from worker.features.hosts.temporal.tickets import TicketTaking

        place = place_of(registered.temporal, self.settings.temporal)
        tls = tls_of(self.settings.temporal, tls=place.tls)
        identity = f"orgworker host {registered.worker}"
        return TicketTaking(store, store.inflight_runs, clock, pool, place, tls, identity, **common)
