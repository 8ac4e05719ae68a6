"""The web side of a worker process: made before the first incarnation, there until the last has ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from importlib.metadata import version

import httpx
from starlette.types import ASGIApp

from worker.clock import Clock, SystemClock
from worker.errors import Busy, ConfigurationError, RolesMissing, Unavailable
from worker.execution.runners.child.linux import allow_many_descriptors
from worker.guard import Guard
from worker.settings import Settings
from worker.store import orgs, roles, schema
from worker.store.database import Database
from worker.store.orgs import OrgCaller
from worker.telemetry import events, logs
from worker.telemetry.events import emit
from worker.telemetry.metrics import Metrics
from worker.telemetry.vitals import Notifier
from worker.tokens.http import open_client
from worker.web.access import Access, FindCaller, Operator
from worker.web.clients import Addresses, Limits
from worker.web.connections import Connections
from worker.web.health import Health
from worker.web.server import WebServer, bind, build, build_health
from worker.wiring.secrets import issuers_of
from worker.wiring.signals import Signals


def metrics_of(settings: Settings, *, version: str) -> Metrics:
    """The metrics of this process; they count every event from now on."""
    metrics = Metrics(version=version, top_orgs=settings.web.metrics_top_orgs)
    events.listen(metrics.take)
    return metrics


class Web:
    """Health, metrics, API and dashboard of one process."""

    def __init__(self, settings: Settings, clock: Clock, health: Health) -> None:
        self._settings = settings
        self._clock = clock
        self._listener: socket.socket | None = None
        self._health_listener: socket.socket | None = None
        self.health = health

    def bind(self, *, needed: bool = False) -> None:
        """Take the addresses, before anything else of the worker begins.

        Unless it is `needed`, a port that is not free is only waited for where it is the
        default, which nobody asked for: a second worker of this machine works without it.

        Raises:
            Busy: another process has the port.
            ConfigurationError: the address is not one of this machine, or not allowed.
        """
        web = self._settings.web
        if web.health_listen:
            self._health_listener = bind(web.health_listen, "health_listen")
        if not web.listen:
            return
        try:
            self._listener = bind(web.listen)
        except Busy:
            if needed or "listen" in web.model_fields_set:
                raise

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve as long as the block lasts."""
        web = self._settings.web
        self.health.protect(self._access({}, _no_org))
        async with contextlib.AsyncExitStack() as stack:
            if web.health_listen:
                app = build_health(self.health)
                await stack.enter_async_context(self._server(app, web.health_listen, self._health_listener))
            if web.listen:
                app = await self._application(stack)
                await stack.enter_async_context(self._server(app, web.listen, self._listener))
            yield

    async def _application(self, stack: contextlib.AsyncExitStack) -> ASGIApp:
        """What `listen` serves; what it needs is closed with `stack`."""
        web = self._settings.web
        # Connections of its own: no page takes one from the loops.
        database = Database.open(self._settings.database.url, clock=self._clock, role="web")
        stack.callback(database.close)
        # Who asks is not known yet: in a role that sees no org.
        unknown = database.acting(roles.NOBODY)

        async def find_caller(code: str, client_id: str) -> OrgCaller | None:
            return await unknown.call_autocommit(orgs.find_caller, code, client_id)

        client = await stack.enter_async_context(open_client())
        return build(
            self.health,
            database,
            self._access(self._guards(client), find_caller),
            self._clock,
            public_url=web.public_url,
            with_health=not web.health_listen,
        )

    def _server(
        self, app: ASGIApp, listen: str, listener: socket.socket | None
    ) -> AbstractAsyncContextManager[None]:
        web = self._settings.web
        connections = Connections(web.connections_per_address, Addresses(web.trusted_proxies))
        return WebServer(app, listen, listener, self._clock, connections=connections).serving()

    def _guards(self, client: httpx.AsyncClient) -> dict[str, Guard]:
        return {
            name: Guard(issuer, client=client, clock=self._clock)
            for name, issuer in issuers_of(self._settings).items()
            if issuer.audience
        }

    def _access(self, guards: Mapping[str, Guard], find_caller: FindCaller) -> Access:
        web = self._settings.web
        return Access(
            [Operator(one.name, one.role, one.token_sha256) for one in web.operators],
            guards,
            find_caller,
            org_role=web.org_role,
            org_scope=web.org_scope,
            addresses=Addresses(web.trusted_proxies),
            limits=Limits(
                self._clock,
                logins_per_minute=web.logins_per_minute,
                calls_per_second=web.calls_per_second,
            ),
        )


async def _no_org(code: str, client_id: str) -> None:
    """Finds no org: where no API is served, operators alone are known."""


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
