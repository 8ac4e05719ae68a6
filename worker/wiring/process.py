"""The worker process: what is locked, checked and exec'ed before any key is read, then the loops."""

from __future__ import annotations

import asyncio

from worker.clock import SystemClock
from worker.execution.children import Children
from worker.settings import Settings
from worker.store import schema
from worker.store.database import Database
from worker.store.lock import lock_sqlite_file
from worker.telemetry import logs
from worker.telemetry.notify import Notifier
from worker.wiring import open_keyring
from worker.wiring.incarnation import Incarnation


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; gives the process's exit code."""
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    notifier = Notifier()
    execution = settings.execution
    on_file = settings.database.sqlite_file is not None
    lock = lock_sqlite_file(settings.database.url, clock=clock) if on_file else None
    database = Database.open(settings.database.url, clock=clock)
    try:
        with database.autocommit() as connection:
            schema.check(connection)
        children = Children(
            clock,
            # On SQLite the file's lock decides, not the lease: nothing is frozen.
            lease=None if on_file else execution.lease,
            max_freeze=execution.max_freeze,
            preload=execution.preload,
            pass_environment=execution.pass_environment,
            lock_fd=None if lock is None else lock.fd,
        )
        children.start()
        # From here on this process holds keys, and nothing is forked from it.
        keyring = open_keyring(settings, create=True)
        incarnation = Incarnation(settings, database, keyring, children, notifier, clock)
        return asyncio.run(incarnation.run())
    finally:
        database.close()
