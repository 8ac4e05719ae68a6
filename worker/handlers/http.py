"""`ctx.http`: an httpx client that sends the org's token to the issuer's API and to nobody else."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Generator, Iterable
from functools import cache

import httpx

from worker.definitions.origins import is_loopback
from worker.handlers.worker_port import BlockingTokenSource, TokenSource

Origin = tuple[str, str, int | None]

_PORTS = {"http": 80, "https": 443}
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)


@cache
def tls_context() -> ssl.SSLContext:
    """The one TLS context of this process; building it takes 10 ms, so the zygote does it once."""
    return httpx.create_ssl_context()


def origin_of(url: httpx.URL | str) -> Origin:
    """Scheme, host and port of a URL: what must be equal for the token to be sent (RFC 6454, section 4)."""
    url = httpx.URL(url)
    return url.scheme, url.host, url.port or _PORTS.get(url.scheme)


def repeatable(request: httpx.Request) -> bool:
    """Whether its body is still there after it was sent, unlike that of a stream."""
    return isinstance(request.stream, httpx.ByteStream)


class _OrgAuth(httpx.Auth):
    """Adds the token where the origin is listed and the handler set no Authorization of its own."""

    def __init__(self, origins: Iterable[str], insecure: Iterable[str]) -> None:
        allowed = frozenset(origin_of(origin) for origin in insecure)
        # An unencrypted origin was refused where it was configured; here the token stays behind in any case.
        self._origins = frozenset(
            origin
            for origin in map(origin_of, origins)
            if origin[0] == "https" or is_loopback(origin[1]) or origin in allowed
        )
        self._sent: set[str] = set()

    def wanted(self, request: httpx.Request) -> bool:
        return "Authorization" not in request.headers and origin_of(request.url) in self._origins

    def put(self, request: httpx.Request, token: str) -> None:
        header = f"Bearer {token}"
        self._sent.add(header)
        request.headers["Authorization"] = header

    def has(self, request: httpx.Request, token: str) -> bool:
        return bool(request.headers.get("Authorization") == f"Bearer {token}")

    def refused(self, response: httpx.Response) -> bool:
        """Whether it is our token that was turned down."""
        turned_down = response.status_code == httpx.codes.UNAUTHORIZED
        return turned_down and response.request.headers.get("Authorization") in self._sent

    def strip(self, request: httpx.Request) -> None:
        """Take our token off a request that a redirect has led to an origin that is not listed.

        httpx drops it on a change of origin, except from http to https of the same host.
        """
        if request.headers.get("Authorization") in self._sent and origin_of(request.url) not in self._origins:
            del request.headers["Authorization"]


class OrgAuth(_OrgAuth):
    """The token for an `AsyncClient`; a 401 mints a fresh one, once a request."""

    def __init__(self, source: TokenSource, origins: Iterable[str], insecure: Iterable[str] = ()) -> None:
        super().__init__(origins, insecure)
        self._source = source

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if not self.wanted(request):
            yield request
            return
        self.put(request, (await self._source.token()).reveal())
        again = repeatable(request)
        response = yield request
        if again and self.refused(response):
            token = await self._source.token()
            if self.has(request, token.reveal()):  # else another call has renewed it already
                token = await self._source.token(fresh=True)
            self.put(request, token.reveal())
            yield request

    async def check(self, request: httpx.Request) -> None:
        self.strip(request)


class BlockingOrgAuth(_OrgAuth):
    """The token for a `Client`; a 401 mints a fresh one, once a request."""

    def __init__(
        self, source: BlockingTokenSource, origins: Iterable[str], insecure: Iterable[str] = ()
    ) -> None:
        super().__init__(origins, insecure)
        self._source = source

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not self.wanted(request):
            yield request
            return
        self.put(request, self._source.token().reveal())
        again = repeatable(request)
        response = yield request
        if again and self.refused(response):
            token = self._source.token()
            if self.has(request, token.reveal()):  # else another call has renewed it already
                token = self._source.token(fresh=True)
            self.put(request, token.reveal())
            yield request

    def check(self, request: httpx.Request) -> None:
        self.strip(request)


def org_client(
    source: TokenSource,
    origins: Iterable[str],
    idempotency_key: str,
    *,
    insecure_origins: Iterable[str] = (),
    traceparent: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """The client of an async handler, bound to its run's token, origins, idempotency key and trace."""
    auth = OrgAuth(source, origins, insecure_origins)
    return httpx.AsyncClient(
        auth=auth,
        headers=_headers(idempotency_key, traceparent),
        event_hooks={"request": [auth.check]},
        timeout=_TIMEOUT,
        verify=tls_context(),
        transport=transport,
    )


def blocking_org_client(
    source: BlockingTokenSource,
    origins: Iterable[str],
    idempotency_key: str,
    *,
    insecure_origins: Iterable[str] = (),
    traceparent: str | None = None,
    transport: httpx.BaseTransport | None = None,
) -> httpx.Client:
    """The client of a handler that blocks, bound to its run's token, origins, idempotency key and trace."""
    auth = BlockingOrgAuth(source, origins, insecure_origins)
    return httpx.Client(
        auth=auth,
        headers=_headers(idempotency_key, traceparent),
        event_hooks={"request": [auth.check]},
        timeout=_TIMEOUT,
        verify=tls_context(),
        transport=transport,
    )


def _headers(idempotency_key: str, traceparent: str | None) -> dict[str, str]:
    headers = {"Idempotency-Key": idempotency_key}
    return headers if traceparent is None else headers | {"traceparent": traceparent}
