"""The HTTP server in the worker's own loop: it leaves signals alone, and its end is not the worker's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from worker.clock import Clock
from worker.errors import Busy, ConfigurationError
from worker.telemetry.events import emit
from worker.web.connections import Connection, Connections, Deadlines

# Seconds before an address that is not free, or a server that failed, is tried again.
AGAIN = 5.0
# Seconds that requests under way are given at the end.
LAST_ANSWERS = 1
# Connections that the kernel keeps until they are accepted, and how many are accepted in one turn of the
# loop: a flood of them must not hold up what else the loop has to do.
BACKLOG = 1024
ACCEPTED = 16
# Milliseconds that a client may leave a response in its way untaken; the kernel then ends the connection.
UNTAKEN = 30_000


def bind(listen: str, setting: str = "listen") -> socket.socket:
    """A listening socket on `host:port`; of a name with several addresses, the first.

    `setting` is the key of [web] that names the address, for errors.

    Raises:
        Busy: another process has the port.
        ConfigurationError: no such address here, or it is not allowed.
    """
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # asyncio sets it only where a socket names its protocol, which a listener's connections do not:
        # each answer would wait 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNTAKEN)
        return listener
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Busy(
                f"[web] {setting}: another process has {listen}",
                fix='end it, or set another port, or "" for none',
            ) from None
        raise ConfigurationError(
            f"[web] {setting}: {listen} cannot be listened on: {error.strerror}",
            fix="name an address of this machine and a port above 1023",
        ) from None


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as usual; then lengthen the kernel's queue again, which asyncio cut to ACCEPTED."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to the worker, which drains; this server ends when the worker has ended."""
        yield


class WebServer:
    """Serves one application for as long as the `async with` lasts, come what may.

    With `listener` None the address is tried until it is free.
    """

    def __init__(
        self,
        app: ASGIApp,
        listen: str,
        listener: socket.socket | None,
        clock: Clock,
        *,
        connections: Connections | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._app = app
        self._connections = Connections() if connections is None else connections
        self._deadlines = deadlines or Deadlines()
        self._listen = listen
        self._listener = listener
        self._clock = clock
        self._server: _Server | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve until the block ends; what is answered just then gets a second more."""
        task = asyncio.create_task(self._for_ever(), name="web")
        try:
            yield
        finally:
            if self._server is not None:
                self._server.should_exit = True
                await asyncio.wait({task}, timeout=LAST_ANSWERS + 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._connections.close()
            if self._listener is not None:
                self._listener.close()

    async def _for_ever(self) -> None:
        told = False
        while self._server is None or not self._server.should_exit:
            try:
                if self._listener is None:
                    self._listener = bind(self._listen)
                await self._serve(self._listener)
                continue
            except (Busy, ConfigurationError) as error:
                if not told:
                    emit("web.unavailable", address=self._listen, error=error.message)
                told = True
            # uvicorn says with SystemExit that it could not start; that must not end the worker.
            except (Exception, SystemExit) as error:
                emit("loop.failed", loop="web", error=f"{type(error).__name__}: {error}")
            await self._clock.sleep(AGAIN)

    async def _serve(self, listener: socket.socket) -> None:
        protocol: Any = functools.partial(
            Connection, connections=self._connections, deadlines=self._deadlines
        )
        config = uvicorn.Config(
            self._app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # `web.addresses` reads what proxies say, of those that the operator trusts.
            proxy_headers=False,
            backlog=ACCEPTED,
            timeout_graceful_shutdown=LAST_ANSWERS,
        )
        self._server = _Server(config)
        host, port = listener.getsockname()[:2]
        emit("web.listening", address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        # A copy: uvicorn closes what it is given, and may have to be started again.
        with listener.dup() as copy:
            await self._server.serve(sockets=[copy])
