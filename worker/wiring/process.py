"""Traces of a worker process, where `[tracing]` asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, Unavailable
from worker.execution.runners.child.pool import ChildPool
from worker.operations.confinement import confinement_of
from worker.operations.keys import check_ring
from worker.settings import Settings
from worker.settings.sections import AlertSettings, TracingSettings
from worker.store import alerts, health, schema
from worker.store.database import Database
from worker.store.engine import lock_sqlite_file
from worker.store.worker_store import heartbeat_database
from worker.telemetry import events, logs, tracing
from worker.telemetry.alerts import Alert, AlertDispatcher, Strike, Strikes, Webhook
from worker.telemetry.masking import masker
from worker.telemetry.overdue_monitor import Deadman, OverdueMonitor, Unfired
from worker.telemetry.vitals import Notifier
from worker.web.health import Health
from worker.wiring import open_keyring
from worker.wiring.incarnation import EXIT_OK, VERSION, Incarnation
from worker.wiring.signals import Signals
from worker.wiring.web import Web, metrics_of

if TYPE_CHECKING:
    from worker.telemetry.otel import OtelTracer

# The standard variables with what may be a collector's key.
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


def tracing_of(
    settings: TracingSettings, clock: Clock, *, version: str
) -> Callable[[], AbstractContextManager[None]]:
    """What makes traces for as long as its block lasts; nothing is sent before.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    if not settings.enabled or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return contextlib.nullcontext
    try:
        from worker.telemetry import otel
    except ImportError as error:
        raise ConfigurationError(
            f"tracing.enabled asks for traces, and OpenTelemetry is not installed ({error.name} is missing)",
            fix="pip install 'orgworker[otel]', or set tracing.enabled to false",
        ) from error
    for headers in (settings.headers, *(os.environ.get(name, "") for name in HEADERS)):
        for part in headers.split(","):
            masker.register(part.partition("=")[2])

    def made() -> OtelTracer:
        exporter = otel.ToldExporter(otel.otlp_exporter(settings.endpoint, settings.headers))
        return otel.OtelTracer(exporter, clock, version=version, dashboard_url=settings.dashboard_url)

    return partial(_traced, made)


@contextlib.contextmanager
def _traced(made: Callable[[], OtelTracer]) -> Iterator[None]:
    tracer = made()
    unheard = events.listen(tracer.hear)
    unused = tracing.use(tracer)
    try:
        yield
    finally:
        unused()
        unheard()
        tracer.close()


@contextlib.contextmanager
def alarms(settings: Settings, database: Database, clock: Clock, asked: Health) -> Iterator[None]:
    """Watch for as long as the block lasts."""
    wanted = settings.alerts

    def oldest() -> Unfired | None:
        with database.autocommit() as connection:
            found = health.oldest_unfired(connection)
        return None if found is None else Unfired(*found)

    watchman = OverdueMonitor(
        oldest,
        clock,
        overdue=wanted.overdue.total_seconds(),
        resting=asked.draining,
        alive=lambda: not asked.stalled(),
        deadman=Deadman(wanted.deadman_url, wanted.deadman_every.total_seconds())
        if wanted.deadman_url
        else None,
    )
    with _told(wanted, database, clock):
        watchman.start()
        try:
            yield
        finally:
            watchman.stop()


class SharedLedger:
    """The alerts in the database, for a thread that is no loop of the worker."""

    def __init__(self, database: Database, overdue: float) -> None:
        self._database = database
        self._overdue = overdue

    def note(self, strikes: Sequence[Strike]) -> None:
        with self._database.transaction() as connection:
            alerts.note(connection, strikes)

    def settle(self) -> None:
        if self._is_any():
            with self._database.transaction() as connection:
                alerts.settle(connection, overdue=self._overdue)

    def claim(self) -> tuple[Alert, int] | None:
        # Most of the time there is none, and to look for it should keep no writer waiting.
        if not self._is_any():
            return None
        with self._database.transaction() as connection:
            return alerts.claim(connection)

    def told(self, alert: Alert) -> None:
        with self._database.transaction() as connection:
            alerts.told(connection, alert)

    def untold(self, alert: Alert, again: float) -> None:
        with self._database.transaction() as connection:
            alerts.untold(connection, alert, again)

    def _is_any(self) -> bool:
        with self._database.autocommit() as connection:
            return alerts.is_any(connection)


@contextlib.contextmanager
def _told(wanted: AlertSettings, database: Database, clock: Clock) -> Iterator[None]:
    """Where a webhook is wanted, it is told of what strikes."""
    if not wanted.webhook_url:
        yield
        return
    strikes = Strikes(clock, lambda: teller.wake())
    webhook = Webhook(wanted.webhook_url, wanted.webhook_secret, clock)
    teller = AlertDispatcher(strikes, SharedLedger(database, wanted.overdue.total_seconds()), webhook, clock)
    unheard = events.listen(strikes.hear)
    teller.start()
    try:
        yield
    finally:
        unheard()
        teller.stop()
        webhook.close()


# Seconds for which a thread keeps the interpreter while another asks for it. The database's threads
# ask at each of their steps: with Python's own 5 ms a busy loop leaves them a tenth of their speed.
SWITCH = 0.0001
# Seconds until an incarnation that could not register is tried again.
AGAIN = 1.0


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; gives the process's exit code."""
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    traced = tracing_of(settings.tracing, clock, version=VERSION)
    notifier = Notifier()
    execution = settings.execution
    confinement = confinement_of(settings)
    confinement.warn()
    on_file = settings.database.sqlite_file is not None
    lock = lock_sqlite_file(settings.database.url, clock=clock) if on_file else None
    database = Database.open(settings.database.url, clock=clock)
    try:
        with database.autocommit() as connection:
            schema.check(connection)
        health = Health(metrics_of(settings, version=VERSION), sandbox=confinement.level)
        web = Web(settings, clock, health)
        web.bind()
        if not settings.keyring_file.exists():
            check_ring(database, None, str(settings.keyring_file))
        children = ChildPool(
            clock,
            # On SQLite the file's lock decides, not the lease: nothing is frozen.
            freezing=not on_file,
            max_freeze=execution.max_freeze,
            preload=execution.preload,
            pass_environment=execution.pass_environment,
            lock_fd=None if lock is None else lock.fd,
            sandbox=confinement.rules,
        )
        children.start()
        _look_for_garbage_seldom()
        sys.setswitchinterval(SWITCH)
        # From here on this process holds keys, and nothing is forked from it.
        try:
            keyring = open_keyring(settings, database=database)
            check_ring(database, keyring, str(keyring.path))
        except ConfigurationError:
            asyncio.run(children.close())
            raise

        def incarnate(signals: Signals) -> Incarnation:
            web.health.starting()
            return Incarnation(
                settings,
                database,
                keyring,
                children,
                notifier,
                signals,
                clock,
                web.health.watch,
                confinement,
            )

        async def served() -> int:
            aside = heartbeat_database(database, execution.lease)
            with traced(), alarms(settings, aside, clock, web.health):
                async with web.serving():
                    return await run_incarnations(incarnate, children, notifier, clock)

        return asyncio.run(served())
    finally:
        database.close()


def _look_for_garbage_seldom() -> None:
    """Let the collector pass over what was loaded, and look less often at what comes and goes.

    By default it comes round every few runs and costs a quarter of an inline one.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def run_incarnations(
    incarnate: Callable[[Signals], Incarnation], children: ChildPool, notifier: Notifier, clock: Clock
) -> int:
    """One incarnation after the other, each made when the one before has lost its lease."""
    signals = Signals()
    # At once: a zygote that dies before the first run must not be the death of that.
    children.attach()
    try:
        exit_code = await incarnate(signals).run()
        while exit_code is None:
            try:
                exit_code = await incarnate(signals).run()
            except Unavailable:
                # It can only have failed to register: the loops bear an absent database.
                if signals.asked:
                    return EXIT_OK  # nothing is held, and nothing unwritten
                notifier.status("waiting for the database")
                notifier.alive()
                await clock.sleep(AGAIN)
        return exit_code
    finally:
        await children.close()
