"""Requests to other services: pooled connections, and how long a response asks to wait.

`Connections` is an httpx transport for HTTP/1.1 that keeps idle connections, for many small requests.

httpx's own pool looks at every connection at the start and the end of each request, which cost a fifth of
a token request. Here a request takes the connection that was used last.
"""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import httpcore
import httpx

from worker.guard import http

# Seconds that an idle connection is kept, and idle connections of each origin.
KEPT, MAX_IDLE = 5.0, 50

Place = tuple[bytes, bytes, int | None]
# The most specific first.
_ERRORS: Mapping[type[Exception], type[httpx.TransportError]] = {
    httpcore.ConnectTimeout: httpx.ConnectTimeout,
    httpcore.TimeoutException: httpx.ReadTimeout,
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.NetworkError: httpx.ReadError,
    httpcore.UnsupportedProtocol: httpx.UnsupportedProtocol,
    httpcore.LocalProtocolError: httpx.LocalProtocolError,
    httpcore.ProtocolError: httpx.RemoteProtocolError,
}


class _Idle(NamedTuple):
    since: float  # monotonic
    connection: httpcore.AsyncHTTPConnection


class Connections(httpx.AsyncBaseTransport):
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
        self._backend = backend
        self._idle: dict[Place, deque[_Idle]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        place = (url.raw_scheme, url.raw_host, url.port)
        sent = httpcore.Request(
            request.method,
            httpcore.URL(scheme=place[0], host=place[1], port=place[2], target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx():
            connection = await self._take(place) or httpcore.AsyncHTTPConnection(
                sent.url.origin,
                ssl_context=self._context,
                keepalive_expiry=self._kept,
                network_backend=self._backend,
            )
            # One that fails has closed itself.
            response = await connection.handle_async_request(sent)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(self, place, connection, response),
            extensions=response.extensions,
        )

    async def keep(self, place: Place, connection: httpcore.AsyncHTTPConnection) -> None:
        """Use the connection again if it can be; close those that were not used for long."""
        now, idle = time.monotonic(), self._idle.setdefault(place, deque())
        if connection.is_idle():
            idle.append(_Idle(now, connection))
        while idle and (idle[0].since < now - self._kept or len(idle) > MAX_IDLE):
            await idle.popleft().connection.aclose()

    async def aclose(self) -> None:
        while self._idle:
            for idle in self._idle.popitem()[1]:
                await idle.connection.aclose()

    async def _take(self, place: Place) -> httpcore.AsyncHTTPConnection | None:
        idle = self._idle.get(place)
        while idle:
            connection = idle.pop().connection
            if not (connection.is_closed() or connection.has_expired()):
                return connection
            await connection.aclose()
        return None


class _Body(httpx.AsyncByteStream):
    def __init__(
        self,
        connections: Connections,
        place: Place,
        connection: httpcore.AsyncHTTPConnection,
        response: httpcore.Response,
    ) -> None:
        self._connections = connections
        self._place = place
        self._connection = connection
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        with _as_httpx():
            await self._response.aclose()
            await self._connections.keep(self._place, self._connection)


@contextmanager
def _as_httpx() -> Iterator[None]:
    try:
        yield
    except tuple(_ERRORS) as error:
        found = next(found for known, found in _ERRORS.items() if isinstance(error, known))
        raise found(str(error)) from error


def open_client(transport: httpx.AsyncBaseTransport | None = None) -> http.ProviderClient:
    """The client that all issuers share, as `worker.guard.http.open_client`; it keeps idle connections."""
    return http.open_client(transport, pool=Connections)


def retry_delay(headers: httpx.Headers, reset_headers: tuple[str, ...], now: float) -> float | None:
    """Seconds that a response asks to wait, or None: Retry-After (RFC 9110, 10.2.3), else a reset header.

    `now` is in seconds since 1970. A reset header holds seconds from now or a Unix time.
    """
    text = headers.get("retry-after", "").strip()
    if text:
        seconds = _seconds(text)
        if seconds is None:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - now
            except (ValueError, TypeError, OverflowError):
                seconds = None
        if seconds is not None:
            return max(seconds, 0.0)
    for name in reset_headers:
        seconds = _seconds(headers.get(name, "").strip())
        if seconds is not None:
            return max(seconds - now if seconds > 1e9 else seconds, 0.0)
    return None


def room_left(
    headers: httpx.Headers, reset_headers: tuple[str, ...], now: float
) -> tuple[float | None, float]:
    """The share of the allowed requests that is left, or None if unknown, and the seconds until it is reset.

    From `RateLimit-Limit`, `RateLimit-Remaining` and `RateLimit-Reset`, or the names of a provider.
    """
    for name in reset_headers:
        limit, left, reset = (
            _seconds(headers.get(name.replace("Reset", part), "").strip())
            for part in ("Limit", "Remaining", "Reset")
        )
        if limit and left is not None and reset is not None:
            return left / limit, max(reset - now if reset > 1e9 else reset, 0.0)
    return None, 0.0


def _seconds(text: str) -> float | None:
    whole, _, fraction = text.partition(".")
    if len(text) > 20 or not text.isascii() or not whole.isdigit() or not (fraction or "0").isdigit():
        return None
    return float(text)
