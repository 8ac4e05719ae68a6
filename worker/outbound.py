"""Requests to other services: pooled connections as httpx takes them."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpcore
import httpx

from worker.connections import KEPT, IdleConnections, PooledConnection
from worker.guard import http

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


class OutboundConnections(httpx.AsyncBaseTransport):
    """`IdleConnections` as httpx takes them."""

    def __init__(
        self,
        context: ssl.SSLContext | None,
        *,
        kept: float = KEPT,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`kept` is in seconds, of an idle connection."""
        self._connections = IdleConnections(context, kept=kept, backend=backend)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        sent = httpcore.Request(
            request.method,
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx():
            connection = await self._connections.take(sent.url)
            # One that fails has closed itself.
            response = await connection.handle_async_request(sent)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(self._connections, sent.url, connection, response),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._connections.aclose()


@dataclass(eq=False)
class _Body(httpx.AsyncByteStream):
    _connections: IdleConnections
    _url: httpcore.URL
    _connection: PooledConnection
    _response: httpcore.Response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        with _as_httpx():
            await self._response.aclose()
            await self._connections.keep(self._url, self._connection)


@contextmanager
def _as_httpx() -> Iterator[None]:
    try:
        yield
    except tuple(_ERRORS) as error:
        found = next(found for known, found in _ERRORS.items() if isinstance(error, known))
        raise found(str(error)) from error


def open_client(transport: httpx.AsyncBaseTransport | None = None) -> http.ProviderClient:
    """The client that all issuers share, as `worker.guard.http.open_client`; it keeps idle connections."""
    return http.open_client(transport, pool=OutboundConnections)
