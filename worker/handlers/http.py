"""`ctx.http`: an httpx client that sends the org's token only to the issuer's API."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import httpx

from worker.guard.urls import DEFAULT_PORTS, is_loopback
from worker.handlers.blocking import finish
from worker.handlers.model_usage import BlockingCount, Count, blocking_counting, counting
from worker.handlers.steps import open_step, request_key
from worker.model.egress import PLACEHOLDER
from worker.secret import AccessToken

if TYPE_CHECKING:
    from worker.handlers.given import Given

Origin = tuple[str, str, int | None]
# Returns the run's token; a new one if the argument is true.
TokenSource = Callable[[bool], Awaitable[AccessToken]]

Hook = Callable[[Any], Any]

KEY = "Idempotency-Key"
TRACE = "traceparent"
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)


@cache
def tls_context() -> ssl.SSLContext:
    """The TLS context of this process. Building it takes 10 ms, so the zygote does it once."""
    return httpx.create_ssl_context()


def origin_of(url: httpx.URL | str) -> Origin:
    """Scheme, host and port of a URL; all must be equal for the token to be sent (RFC 6454, section 4)."""
    url = httpx.URL(url)
    return url.scheme, url.host, url.port or DEFAULT_PORTS.get(url.scheme)


class OrgAuth(httpx.Auth):
    """Adds the token if the origin is listed and the handler set no Authorization header.

    A 401 mints a fresh token, once per request. `prepare` is the hook of the same client.
    """

    def __init__(self, given: Given[Any, Any], token: TokenSource) -> None:
        self._api = frozenset(map(origin_of, given.api_origins))
        self._trace = given.traceparent
        insecure = frozenset(map(origin_of, given.insecure_origins))
        # Configuration already refuses an unencrypted origin; this is the second line of defence.
        self._origins = frozenset(
            origin
            for origin in self._api
            if origin[0] == "https" or is_loopback(origin[1]) or origin in insecure
        )
        self._token = token
        self._run_key = given.run.idempotency_key
        self._sent: set[str] = set()

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if "Authorization" in request.headers or origin_of(request.url) not in self._origins:
            yield request
            return
        header = await self._authorize(request)
        # A streamed body is gone after it was sent.
        repeatable = isinstance(request.stream, httpx.ByteStream)
        response = yield request
        refused = response.status_code == httpx.codes.UNAUTHORIZED
        if repeatable and refused and response.request.headers.get("Authorization") in self._sent:
            if await self._authorize(request) == header:  # else another call has renewed it already
                await self._authorize(request, fresh=True)
            yield request

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        flow = self.async_auth_flow(request)
        try:
            step = finish(flow.__anext__())
            while True:
                step = finish(flow.asend((yield step)))
        except StopAsyncIteration:
            pass
        finally:
            finish(flow.aclose())

    async def _authorize(self, request: httpx.Request, *, fresh: bool = False) -> str:
        header = f"Bearer {(await self._token(fresh)).reveal()}"
        self._sent.add(header)
        request.headers["Authorization"] = header
        return header

    def strip(self, request: httpx.Request) -> None:
        """Remove our token from a request that was redirected to an origin that is not listed.

        httpx drops it when the origin changes, except from http to https of the same host.
        """
        if request.headers.get("Authorization") in self._sent and origin_of(request.url) not in self._origins:
            del request.headers["Authorization"]

    def prepare(self, request: httpx.Request) -> None:
        """The hook of each request; inside a step it gets an idempotency key of its own.

        Only the org's API learns the run's place in a trace.
        """
        self.strip(request)
        if request.headers.get(TRACE) == self._trace and origin_of(request.url) not in self._api:
            request.headers.pop(TRACE, None)
        step = open_step()
        # A request that is repeated or redirected has its key already, or the handler has set another.
        if step is not None and request.headers.get(KEY) == self._run_key:
            request.headers[KEY] = request_key(self._run_key, step)

    def drop_key(self, request: httpx.Request) -> None:
        """Remove what a library sends as its key to the org's API, unless the broker replaces it."""
        key = request.headers.get("Authorization", "")
        if origin_of(request.url) in self._origins and PLACEHOLDER not in key:
            request.headers.pop("Authorization", None)

    async def async_prepare(self, request: httpx.Request) -> None:
        self.prepare(request)


class _LibraryClient(httpx.AsyncClient):
    """A client that a library gets; `drop_key` is called before the token is added."""

    def __init__(self, drop_key: Callable[[httpx.Request], None], **options: Any) -> None:
        super().__init__(**options)
        self._drop_key = drop_key

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        self._drop_key(request)
        return await super().send(request, **options)


class _BlockingLibraryClient(httpx.Client):
    """The same for a handler that blocks."""

    def __init__(self, drop_key: Callable[[httpx.Request], None], **options: Any) -> None:
        super().__init__(**options)
        self._drop_key = drop_key

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        self._drop_key(request)
        return super().send(request, **options)


def org_client(
    given: Given[Any, Any],
    token: TokenSource,
    transport: httpx.AsyncBaseTransport | None,
    *,
    base_url: str = "",
    count: Count | None = None,
    authorizes: bool = True,
    of_library: bool = False,
) -> httpx.AsyncClient:
    """The client of an async handler, bound to its run's token, origins, idempotency key and trace.

    `count` gets the tokens that the answer of a model has cost. Without `authorizes` a broker adds the token.
    A client of a library sends the org's token in place of the library's key.
    """
    auth = OrgAuth(given, token)
    options = _options(given, auth.async_prepare, None if count is None else counting(count))
    kind = partial(_LibraryClient, auth.drop_key) if of_library else httpx.AsyncClient
    return kind(auth=auth if authorizes else None, transport=transport, base_url=base_url, **options)


def blocking_org_client(
    given: Given[Any, Any],
    token: TokenSource,
    transport: httpx.BaseTransport | None,
    *,
    base_url: str = "",
    count: BlockingCount | None = None,
    authorizes: bool = True,
    of_library: bool = False,
) -> httpx.Client:
    """The same for a handler that blocks."""
    auth = OrgAuth(given, token)
    options = _options(given, auth.prepare, None if count is None else blocking_counting(count))
    kind = partial(_BlockingLibraryClient, auth.drop_key) if of_library else httpx.Client
    return kind(auth=auth if authorizes else None, transport=transport, base_url=base_url, **options)


def _options(given: Given[Any, Any], on_request: Hook, on_response: Hook | None) -> dict[str, Any]:
    headers = {KEY: given.run.idempotency_key}
    if given.traceparent is not None:
        headers[TRACE] = given.traceparent
    hooks = {"request": [on_request], "response": [on_response] if on_response else []}
    return {"headers": headers, "timeout": _TIMEOUT, "verify": tls_context(), "event_hooks": hooks}
