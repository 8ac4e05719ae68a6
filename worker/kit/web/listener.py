"""Listeners: an HTTP server in the process's event loop, and health alone behind one.

This module needs no database: a host serves its health with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import uvicorn
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.clock import Clock
from worker.errors import Busy, ConfigurationError
from worker.kit.web.connections import ClientDeadlines, Connection, Connections
from worker.kit.web.health import PATHS, Health
from worker.kit.web.responses import ErrorMiddleware
from worker.telemetry.events import emit

# Concurrent requests of API and console; fewer than the connections of a listener.
MAX_REQUESTS = 500
# Seconds before an occupied address, or a server that failed, is tried again.
AGAIN = 5.0
# Seconds that running requests get at the end.
LAST_RESPONSES = 1
# Connections that the kernel queues, and how many are accepted in one turn of the event loop, so that a
# flood of them does not delay the worker's loops.
BACKLOG = 1024
ACCEPTED = 16
# Milliseconds without progress after which the kernel ends a connection whose client reads no response.
UNREAD = 30_000


class RequestLimit:
    """ASGI middleware: answers 503 beyond MAX_REQUESTS, but always serves health.

    Metrics that name orgs are counted: verifying their token may take a while.
    """

    def __init__(self, app: ASGIApp, health: Health) -> None:
        self._app = app
        self._exempt = PATHS - {"/metrics"} if health.metrics.name_orgs else PATHS
        self._serving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._exempt:
            await self._app(scope, receive, send)
            return
        if self._serving >= MAX_REQUESTS:
            raise Busy(f"{MAX_REQUESTS} requests are being served", fix="try again in a moment")
        self._serving += 1
        counted = True

        def release() -> None:
            nonlocal counted
            self._serving -= counted
            counted = False

        # An event stream has limits of its own.
        scope["release"] = release
        try:
            await self._app(scope, receive, send)
        finally:
            release()


def build_health(health: Health) -> ASGIApp:
    """Health and metrics alone, for a listener of their own; every other path is 404."""
    return ErrorMiddleware(RequestLimit(Router(routes=health.routes(), redirect_slashes=False), health))


def server_tls(certificate: str, key: str, section: str) -> ssl.SSLContext:
    """TLS with these PEM files. Raises ConfigurationError, which names the settings of `section`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for setting, path in (("certificate", certificate), ("key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigurationError(
                f"[{section}] {setting}: {path} cannot be read: {error.strerror}",
                fix="name a PEM file that the worker's user can read",
            ) from None
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            f"[{section}] certificate and key do not belong together, or are not PEM: {error}",
            fix="name the certificate with its chain, and the private key of it without a password",
        ) from None
    return context


def bind(listen: str, setting: str = "[web] listen") -> socket.socket:
    """Open a listening socket on `host:port`; for a name with several addresses, on the first.

    `setting` names the address in error messages.

    Raises:
        Busy: another process has the port.
        ConfigurationError: it is not an address of this machine, or not allowed.
    """
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # asyncio does not set it for a listener's connections; each response would wait 40 ms for an
        # acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)
        return listener
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Busy(
                f"{setting}: another process has {listen}",
                fix='stop it, or set another port, or "" for none',
            ) from None
        raise ConfigurationError(
            f"{setting}: cannot listen on {listen}: {error.strerror}",
            fix="use an address of this machine and a port above 1023",
        ) from None


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then restore the length of the kernel's queue, which asyncio sets to ACCEPTED."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the worker, which drains."""
        yield


@dataclass(eq=False, repr=False)
class WebServer:
    """Serves one application for as long as the `async with` lasts, and restarts after failures.

    Without a `listener` it retries until the address is free; `told` is whether its first failure was
    reported already. With `tls` it speaks HTTPS only.
    """

    app: ASGIApp
    listen: str
    listener: socket.socket | None
    clock: Clock
    _: KW_ONLY
    connections: Connections = field(default_factory=Connections)
    deadlines: ClientDeadlines = field(default_factory=ClientDeadlines)
    tls: ssl.SSLContext | None = None
    event: str = "web.listening"
    told: bool = False
    _server: _Server | None = field(default=None, init=False)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve until the block ends; running requests get another second."""
        task = asyncio.create_task(self._serve_forever(), name="web")
        try:
            yield
        finally:
            if self._server is not None:
                self._server.should_exit = True
                await asyncio.wait({task}, timeout=LAST_RESPONSES + 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.connections.close()
            if self.listener is not None:
                self.listener.close()

    async def _serve_forever(self) -> None:
        while self._server is None or not self._server.should_exit:
            try:
                if self.listener is None:
                    self.listener = bind(self.listen)
                await self._serve(self.listener)
                continue
            except (Busy, ConfigurationError) as error:
                if not self.told:
                    emit("web.unavailable", address=self.listen, error=error.message)
                self.told = True
            # uvicorn raises SystemExit if it cannot start; that must not end the worker.
            except (Exception, SystemExit) as error:
                emit("loop.failed", loop="web", error=f"{type(error).__name__}: {error}")
            await self.clock.sleep(AGAIN)

    async def _serve(self, listener: socket.socket) -> None:
        protocol: Any = functools.partial(Connection, connections=self.connections, deadlines=self.deadlines)
        config = uvicorn.Config(
            self.app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # `kit.web.clients` reads the headers of trusted proxies.
            proxy_headers=False,
            backlog=ACCEPTED,
            timeout_graceful_shutdown=LAST_RESPONSES,
            ssl_context_factory=None if (tls := self.tls) is None else lambda _config, _default: tls,
        )
        self._server = _Server(config)
        host, port = listener.getsockname()[:2]
        emit(self.event, address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        # A copy: uvicorn closes its socket, and may have to be started again.
        with listener.dup() as copy:
            await self._server.serve(sockets=[copy])
