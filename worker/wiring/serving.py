"""`serve`: health, API and dashboard of an installation, by a process that fires and runs nothing."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from importlib.metadata import version

from worker.clock import SystemClock
from worker.errors import ConfigurationError, RolesMissing, Unavailable
from worker.execution.processes.linux import allow_many_descriptors
from worker.settings import Settings
from worker.store import roles, schema
from worker.store.database import Database
from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.notify import Notifier
from worker.web.health import Health
from worker.wiring.signals import Signals
from worker.wiring.web import Web, metrics_of

# Seconds between two looks whether the database answers, and for how long one may last.
LOOK_EVERY = 5.0


class WebHealth(Health):
    """Ready while the database answers with this release's schema; there are no loops to look after."""

    _lacking: tuple[str, ...] = ("starting",)

    def lacking(self) -> list[str]:
        return list(self._lacking)

    async def look(self, database: Database) -> None:
        """Ask the database once."""
        try:
            async with asyncio.timeout(LOOK_EVERY):
                await database.run(schema.check_for_web, database)
        except (Unavailable, TimeoutError):
            self._lacking = ("database",)
        except RolesMissing:
            self._lacking = ("roles",)
        except ConfigurationError:
            self._lacking = ("schema",)
        else:
            self._lacking = ()

    def stopping(self) -> None:
        self._lacking = ("draining",)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; gives the process's exit code.

    Raises:
        Busy: another process has the port.
        ConfigurationError: `web.listen` is empty or no address of this machine, or the schema is another's.
        RolesMissing: the database's login may not act for callers.
        StoreUnavailable: the database does not answer at the start.
    """
    if not settings.web.listen:
        raise ConfigurationError(
            '[web] listen is "", so there is nothing to serve', fix="such as --set web.listen=127.0.0.1:8470"
        )
    clock = SystemClock()
    logs.configure(settings.log.style or None, level=settings.log.level)
    allow_many_descriptors()
    health = WebHealth(metrics_of(settings, version=version("orgworker")))
    database = Database.open(settings.database.url, clock=clock, role="web")
    try:
        schema.check_for_web(database)
        _say_what_is_too_much(database)
        web = Web(settings, clock, health)
        web.bind(needed=True)
        asyncio.run(_serve(web, health, database))
    finally:
        database.close()
    return 0


def _say_what_is_too_much(database: Database) -> None:
    """Log what the login may do beyond acting for callers, which a fault of the web side would use."""
    if database.dialect == "postgresql":
        with database.autocommit() as connection:
            for warning in roles.serve_warnings(connection):
                emit("web.rights", detail=warning)


async def _serve(web: Web, health: WebHealth, database: Database) -> None:
    notifier = Notifier()
    stop = asyncio.Event()
    Signals().pass_to(stop.set)
    async with web.serving():
        notifier.ready("serving")
        while not stop.is_set():
            await health.look(database)
            notifier.alive()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_EVERY)
        health.stopping()
        notifier.stopping(LOOK_EVERY)
