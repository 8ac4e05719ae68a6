"""The worker process: what is locked, checked and exec'ed before any key is read, then the loops."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, Unavailable
from worker.execution.children import Children
from worker.operations.confinement import confinement_of
from worker.operations.keys import check_ring
from worker.settings import Settings
from worker.store import schema
from worker.store.database import Database
from worker.store.for_worker import beside_the_work
from worker.store.lock import lock_sqlite_file
from worker.telemetry import logs
from worker.telemetry.notify import Notifier
from worker.web.health import Health
from worker.wiring import open_keyring
from worker.wiring.alarms import alarms
from worker.wiring.incarnation import EXIT_OK, VERSION, Incarnation
from worker.wiring.signals import Signals
from worker.wiring.tracing import tracing_of
from worker.wiring.web import Web, metrics_of

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
        children = Children(
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
            aside = beside_the_work(database, execution.lease)
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
    incarnate: Callable[[Signals], Incarnation], children: Children, notifier: Notifier, clock: Clock
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
