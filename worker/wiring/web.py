"""The web side of a worker process: made before the first incarnation, there until the last has ended."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import httpx
from starlette.types import ASGIApp

from worker.clock import Clock
from worker.errors import Busy
from worker.guard import Guard
from worker.settings import Settings
from worker.store import orgs, roles
from worker.store.database import Database
from worker.store.orgs import OrgCaller
from worker.telemetry import events
from worker.telemetry.metrics import Metrics
from worker.tokens.http import open_client
from worker.web.access import Access, Operator
from worker.web.app import build, build_health
from worker.web.connections import Connections
from worker.web.health import Health
from worker.web.server import WebServer, bind
from worker.wiring.issuers import issuers_of


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
        async with contextlib.AsyncExitStack() as stack:
            if web.health_listen:
                app = build_health(self.health)
                await stack.enter_async_context(self._server(app, web.health_listen, self._health_listener))
            if web.listen:
                # Connections of its own: no page takes one from the loops.
                database = Database.open(self._settings.database.url, clock=self._clock, role="web")
                stack.callback(database.close)
                client = await stack.enter_async_context(open_client())
                access = self._access(database, client)
                app = build(self.health, database, access, self._clock, with_health=not web.health_listen)
                await stack.enter_async_context(self._server(app, web.listen, self._listener))
            yield

    def _server(
        self, app: ASGIApp, listen: str, listener: socket.socket | None
    ) -> AbstractAsyncContextManager[None]:
        connections = Connections(per_address=self._settings.web.connections_per_address)
        return WebServer(app, listen, listener, self._clock, connections=connections).serving()

    def _access(self, database: Database, client: httpx.AsyncClient) -> Access:
        web = self._settings.web
        guards = {
            name: Guard(issuer, client=client, clock=self._clock)
            for name, issuer in issuers_of(self._settings).items()
            if issuer.audience
        }
        operators = [Operator(one.name, one.role, one.token_sha256) for one in web.operators]

        # Who asks is not known yet: in a role that sees no org.
        unknown = database.acting(roles.NOBODY)

        async def find_caller(code: str, client_id: str) -> OrgCaller | None:
            return await unknown.call_autocommit(orgs.find_caller, code, client_id)

        return Access(operators, guards, find_caller, org_role=web.org_role, org_scope=web.org_scope)
