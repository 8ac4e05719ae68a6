"""The web side of a process: health and metrics, and the pages of a feature, on the addresses of `[web]`."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from starlette.types import ASGIApp

from worker.clock import Clock
from worker.errors import Busy
from worker.kit.feature import Point
from worker.kit.web.clients import Addresses
from worker.kit.web.connections import Connections
from worker.kit.web.health import Health, MetricsAccess
from worker.kit.web.listener import WebServer, bind, build_health
from worker.settings import Settings
from worker.store.database import Database


class WebPages(Protocol):
    """What a process serves on `[web] listen` besides health and metrics."""

    def check(self) -> None:
        """Raise ConfigurationError if they cannot be served."""

    def metrics_access(self) -> MetricsAccess:
        """Who authenticates operators, for metrics that name orgs."""

    def announce(self, database: Database, address: tuple[str, int]) -> None:
        """Tell the person at a terminal how to reach them."""

    async def application(self, stack: contextlib.AsyncExitStack) -> ASGIApp:
        """The application, which also serves health; `stack` closes its resources."""


# The pages of a worker; `open_ring` opens the key ring for what people change there.
PAGES: Point[Callable[..., WebPages]] = Point("console.pages", "the console")

_TAKEN = (
    "no console yet: another process has {}; the worker runs, and opens the port once it is free. "
    "Another port: --set web.listen=127.0.0.1:PORT before the verb; none: --set web.listen="
)


class Web:
    """Health and metrics of one process, and its `pages` if it has any."""

    def __init__(
        self, settings: Settings, clock: Clock, health: Health, pages: WebPages | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._listener: socket.socket | None = None
        self._told = False
        self._health_listener: socket.socket | None = None
        self._health = health
        self._pages = pages

    def bind(self, *, required: bool = False) -> None:
        """Bind the addresses, before the worker starts anything else.

        If `listen` is not configured and its default port is in use, a worker says so, starts without it
        and retries, unless `required`: several workers can share a machine.

        Raises:
            Busy: another process uses the port.
            ConfigurationError: the address does not belong to this machine or is not allowed, or the
                secret of `[web.login]` cannot be read.
        """
        web = self._settings.web
        if web.listen and self._pages is not None:
            self._pages.check()
        if web.health_listen:
            self._health_listener = bind(web.health_listen, "[web] health_listen")
        if not web.listen:
            return
        try:
            self._listener = bind(web.listen)
        except Busy:
            if required or "listen" in web.model_fields_set:
                raise
            # Who asked for JSON gets the event of the listener.
            if self._settings.log.style != "json":
                self._told = True
                print(_TAKEN.format(web.listen), file=sys.stderr, flush=True)

    def announce(self, database: Database) -> None:
        """Tell the person at a terminal how to reach the pages."""
        if self._listener is not None and self._pages is not None:
            self._pages.announce(database, self._listener.getsockname()[:2])

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve within the block."""
        web = self._settings.web
        if self._pages is not None:
            self._health.protect(self._pages.metrics_access())
        async with contextlib.AsyncExitStack() as stack:
            if web.health_listen:
                app = build_health(self._health)
                await stack.enter_async_context(self._server(app, web.health_listen, self._health_listener))
            if web.listen:
                app = build_health(self._health)
                if self._pages is not None:
                    app = await self._pages.application(stack)
                await stack.enter_async_context(self._server(app, web.listen, self._listener))
            yield

    def _server(
        self, app: ASGIApp, listen: str, listener: socket.socket | None
    ) -> AbstractAsyncContextManager[None]:
        web = self._settings.web
        connections = Connections(web.connections_per_address, Addresses(web.trusted_proxies))
        told = self._told and listener is None
        return WebServer(app, listen, listener, self._clock, connections=connections, told=told).serving()
