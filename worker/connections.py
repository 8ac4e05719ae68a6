"""Pooled HTTP/1.1 connections of asyncio, for many small requests; without httpx, which takes 8 MB.

httpx's own pool looks at every connection at the start and the end of each request, which cost a fifth of
a token request. Here a request takes the connection that was used last. It is sent as a whole, by
`Sockets`.
"""

from __future__ import annotations

import asyncio
import select
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpcore

# Seconds that an idle connection is kept, and idle connections of each origin.
KEPT = 5.0
MAX_IDLE = 50
# Bytes that are collected before they are sent, and that may have arrived before reading pauses.
UNSENT = 64 * 1024
UNREAD = 256 * 1024
# Seconds until an address of another family is tried too (RFC 8305).
NEXT_ADDRESS = 0.25

# Scheme, host and port.
Place = tuple[bytes, bytes, int | None]


class _Idle(NamedTuple):
    since: float  # monotonic
    connection: PooledConnection


class _NoLock:
    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *error: object) -> None:
        pass


class PooledConnection(httpcore.AsyncHTTPConnection):
    """A connection for one request at a time: the locks of httpcore's own, three a request, each cost a turn
    of the loop."""

    _connection: httpcore.AsyncHTTP11Connection | None

    async def open(self, request: httpcore.Request) -> httpcore.AsyncHTTP11Connection:
        """Connect, unless that is done, within the timeouts of a request; sends none of it."""
        if self._connection is None:
            try:
                stream = await self._connect(request)
            except BaseException:
                self._connect_failed = True
                raise
            self._connection = httpcore.AsyncHTTP11Connection(self._origin, stream, self._keepalive_expiry)
            self._connection._state_lock = _NoLock()  # type: ignore[assignment]
        return self._connection

    def is_usable(self) -> bool:
        """Whether it is open, as far as is known."""
        if self._connection is None:
            return not (self.is_closed() or self.has_expired())
        # One that has sent nothing yet never expires by itself.
        is_over = self._connection._network_stream.get_extra_info("is_readable")
        return not (is_over or self.is_closed() or self.has_expired())

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        return await (await self.open(request)).handle_async_request(request)


class IdleConnections:
    """Connections to any number of origins, without a limit: the callers have theirs."""

    def __init__(
        self,
        context: ssl.SSLContext | None,
        *,
        kept: float = KEPT,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`kept` is in seconds, of an idle connection."""
        self._context = context
        self._kept = kept
        self._backend = backend or Sockets()
        self._idle: dict[Place, deque[_Idle]] = {}

    async def take(self, url: httpcore.URL) -> PooledConnection:
        """A connection for one request: the idle one that was used last, or a new one."""
        idle = self._idle.get((url.scheme, url.host, url.port))
        while idle:
            connection = idle.pop().connection
            if connection.is_usable():
                return connection
            await connection.aclose()
        return PooledConnection(
            url.origin,
            ssl_context=self._context,
            keepalive_expiry=self._kept,
            network_backend=self._backend,
        )

    async def keep(self, url: httpcore.URL, connection: PooledConnection) -> None:
        """Use the connection again if it can be; close those that were not used for long."""
        idle = self._idle.setdefault((url.scheme, url.host, url.port), deque())
        if connection.is_idle() and not _has_rest(connection):
            idle.append(_Idle(time.monotonic(), connection))
        else:
            await connection.aclose()
        await self._close_old(idle)

    async def tidy(self) -> int:
        """Close what was not used for long; returns how many connections are left."""
        left = 0
        for place, idle in list(self._idle.items()):
            await self._close_old(idle)
            left += len(idle)
            if not idle:
                self._idle.pop(place, None)
        return left

    async def aclose(self) -> None:
        while self._idle:
            for idle in self._idle.popitem()[1]:
                await idle.connection.aclose()

    async def _close_old(self, idle: deque[_Idle]) -> None:
        oldest = time.monotonic() - self._kept
        while idle and (idle[0].since < oldest or len(idle) > MAX_IDLE):
            await idle.popleft().connection.aclose()


def _has_rest(connection: PooledConnection) -> bool:
    """Whether more than the answer has arrived: it would be taken for the answer to the next request."""
    protocol = connection._connection
    return isinstance(protocol, httpcore.AsyncHTTP11Connection) and bool(protocol._h11_state.trailing_data[0])


class Sockets(httpcore.AsyncNetworkBackend):
    """Opens TCP connections of asyncio for httpcore.

    With httpcore's own, on anyio, a token costs a worker a quarter more processor time
    (`bench.cold_tokens`), and a cold run in `bench.nine` a fifth more of workers and server: each part of a
    request is sent by itself, and each step yields to the event loop and pauses or resumes reading.
    Once `may_send` says no, nothing more is sent, and the connection is closed. After `unread` bytes have
    arrived, reading pauses.
    """

    def __init__(
        self,
        may_send: Callable[[], bool] = lambda: True,
        *,
        unread: int = UNREAD,
        next_address: float | None = NEXT_ADDRESS,
    ) -> None:
        # `next_address`: seconds until the next address is tried as well; with None each address is tried
        # after the one before. Trying several at once may leave a socket open if it is cancelled.
        self._may_send = may_send
        self._unread = unread
        self._next_address = next_address

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address of the host that answers.

        Raises:
            httpcore.ConnectTimeout, httpcore.ConnectError
        """
        with _connecting():
            async with asyncio.timeout(timeout):
                _, stream = await asyncio.get_running_loop().create_connection(
                    lambda: _Stream(self._may_send, self._unread),
                    host,
                    port,
                    happy_eyeballs_delay=self._next_address,
                )
        return stream


class _Stream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One connection. A request is sent as a whole, once its response is waited for."""

    _transport: asyncio.Transport

    def __init__(self, may_send: Callable[[], bool], unread: int) -> None:
        self._may_send = may_send
        self._unread = unread
        self._unsent = bytearray()
        self._received = bytearray()
        self._is_over = self._is_paused = False
        self._error: Exception | None = None
        # Waits for data, for the end, or until what was sent has left.
        self._waiter: asyncio.Future[None] | None = None
        self._is_full = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > self._unread:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over, self._error = True, exc
        self._wake()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()

    # What httpcore calls.

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._send()
        if not self._received and not self._is_over:
            await self._wait(timeout, httpcore.ReadTimeout)
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        if self._is_paused and not self._received:
            self._is_paused = False
            self._transport.resume_reading()
        if not data and self._error is not None:
            raise httpcore.ReadError(str(self._error)) from self._error
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._is_over:
            raise httpcore.WriteError("the connection was closed")
        self._unsent += buffer
        if len(self._unsent) > UNSENT:
            self._send()
            while self._is_full and not self._is_over:
                await self._wait(timeout, httpcore.WriteTimeout)

    async def aclose(self) -> None:
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        with _connecting():
            async with asyncio.timeout(timeout):
                encrypted = await asyncio.get_running_loop().start_tls(
                    self._transport, self, ssl_context, server_hostname=server_hostname
                )
        if encrypted is None:
            raise httpcore.ConnectError("the connection was closed")
        self._transport = encrypted
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return bool(self._is_over or self._received or self._is_readable())
        return self._transport.get_extra_info(_NAMES.get(info, info))

    def _is_readable(self) -> bool:
        """Whether the end has arrived, or data that was not asked for, before the loop knows it."""
        if self._transport.is_closing():
            return True
        look = select.poll()
        look.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(look.poll(0))

    def _send(self) -> None:
        if self._unsent and not self._is_over:
            if not self._may_send():
                self._transport.abort()
                raise httpcore.WriteError("nothing may be sent now")
            self._transport.write(bytes(self._unsent))
            self._unsent.clear()

    async def _wait(self, timeout: float | None, late: type[Exception]) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if timeout is None:
                await self._waiter
            else:
                async with asyncio.timeout(timeout):
                    await self._waiter
        except TimeoutError as error:
            raise late("the other side is silent") from error
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


# Of httpcore, as asyncio calls them.
_NAMES = {"client_addr": "sockname", "server_addr": "peername"}


@contextmanager
def _connecting() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpcore.ConnectTimeout("no connection in time") from error
    except OSError as error:  # a certificate that is refused too
        raise httpcore.ConnectError(str(error)) from error
