"""Transports of httpx2 over clients of httpx: the classes of the two libraries are unrelated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager

import httpx

try:
    import httpx2
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "a client of httpx2 needs the package httpx2: install orgworker with its extra pydantic-ai",
        name=missing.name,
    ) from missing

# The client that sends a request sets these itself.
LEFT_OUT = frozenset({"host", "content-length", "accept-encoding"})
TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
# These describe the body as it was sent; it is passed on decoded.
_OF_THE_BODY = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def over(http: httpx.AsyncClient) -> httpx2.AsyncClient:
    """An httpx2 client whose requests are sent by `http`, with all of their headers."""
    return httpx2.AsyncClient(transport=Httpx2Transport(http), timeout=TIMEOUT)


def blocking_over(http: httpx.Client) -> httpx2.Client:
    """The same for a handler that blocks."""
    return httpx2.Client(transport=_BlockingTransport(http), timeout=TIMEOUT)


class Httpx2Transport(httpx2.AsyncBaseTransport):
    def __init__(self, http: httpx.AsyncClient, left_out: Collection[str] = LEFT_OUT) -> None:
        self._http = http
        self._left_out = left_out

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        # Read at once, so that it can be sent again after a 401.
        sent = _sent_by(self._http, request, await request.aread(), self._left_out)
        with _errors_of_httpx2(request):
            response = await self._http.send(sent, stream=True, follow_redirects=False)
        return httpx2.Response(
            response.status_code, headers=_headers_of(response), stream=_Body(response, request)
        )


class _BlockingTransport(httpx2.BaseTransport):
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        sent = _sent_by(self._http, request, request.read(), LEFT_OUT)
        with _errors_of_httpx2(request):
            response = self._http.send(sent, stream=True, follow_redirects=False)
        return httpx2.Response(
            response.status_code, headers=_headers_of(response), stream=_BlockingBody(response, request)
        )


def _sent_by(
    http: httpx.Client | httpx.AsyncClient, request: httpx2.Request, content: bytes, left_out: Collection[str]
) -> httpx.Request:
    return http.build_request(
        request.method,
        str(request.url),
        headers=[(name, value) for name, value in request.headers.multi_items() if name not in left_out],
        content=content,
        timeout=httpx.Timeout(**request.extensions.get("timeout", {"timeout": None})),
    )


def _headers_of(response: httpx.Response) -> list[tuple[str, str]]:
    return [item for item in response.headers.multi_items() if item[0] not in _OF_THE_BODY]


class _Body(httpx2.AsyncByteStream):
    """The body of a response, as it arrives."""

    def __init__(self, response: httpx.Response, request: httpx2.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of_httpx2(self._request):
            async for chunk in self._response.aiter_bytes():
                yield chunk

    async def aclose(self) -> None:
        await self._response.aclose()


class _BlockingBody(httpx2.SyncByteStream):
    """The same for a handler that blocks."""

    def __init__(self, response: httpx.Response, request: httpx2.Request) -> None:
        self._response = response
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        with _errors_of_httpx2(self._request):
            yield from self._response.iter_bytes()

    def close(self) -> None:
        self._response.close()


@contextmanager
def _errors_of_httpx2(request: httpx2.Request) -> Iterator[None]:
    """Raise an error of the connection as the one that httpx2's callers expect; both have the same names."""
    try:
        yield
    except httpx.TransportError as error:
        raise getattr(httpx2, type(error).__name__)(str(error), request=request) from error
