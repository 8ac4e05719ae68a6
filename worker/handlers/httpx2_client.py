"""`httpx2_client`: `ctx.http` for libraries that need httpx2, such as the clients of OpenAI and MCP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from worker.handlers.context import Context

try:
    import httpx2
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "httpx2_client needs the package httpx2: install orgworker with its extra pydantic-ai",
        name=missing.name,
    ) from missing

# `ctx.http` sets these itself. It adds the org's token only to requests without an Authorization header.
_LEFT_OUT = frozenset({"host", "content-length", "accept-encoding", "authorization"})
# These describe the body as it was sent; it is passed on decoded.
_OF_THE_BODY = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def httpx2_client(ctx: Context[Any, Any]) -> httpx2.AsyncClient:
    """An httpx2 client whose requests are sent by `ctx.http`.

    They carry the org's token, and only to `api_origins`; an `Authorization` header of the library is
    dropped, so its API key may be any text. Closing the client does not close `ctx.http`.
    """
    if not isinstance(ctx, Context):
        raise TypeError("httpx2_client needs the Context of an async handler")
    return httpx2.AsyncClient(transport=_OrgTransport(ctx.http), timeout=httpx2.Timeout(30.0, connect=10.0))


class _OrgTransport(httpx2.AsyncBaseTransport):
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        sent = self._http.build_request(
            request.method,
            str(request.url),
            headers=[(name, value) for name, value in request.headers.multi_items() if name not in _LEFT_OUT],
            # Read at once, so that it can be sent again after a 401.
            content=await request.aread(),
            timeout=httpx.Timeout(**request.extensions.get("timeout", {"timeout": None})),
        )
        with _errors_of_httpx2(request):
            response = await self._http.send(sent, stream=True, follow_redirects=False)
        return httpx2.Response(
            response.status_code,
            headers=[item for item in response.headers.multi_items() if item[0] not in _OF_THE_BODY],
            stream=_Body(response, request),
        )


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


@contextmanager
def _errors_of_httpx2(request: httpx2.Request) -> Iterator[None]:
    """Raise an error of the connection as the one that httpx2's callers expect; both have the same names."""
    try:
        yield
    except httpx.TransportError as error:
        raise getattr(httpx2, type(error).__name__)(str(error), request=request) from error
