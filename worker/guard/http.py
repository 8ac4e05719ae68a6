"""HTTP to providers: one shared client, a deadline for each exchange, a size limit for each response."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.request import getproxies
from weakref import WeakKeyDictionary

import httpx

from .clock import Clock
from .strict_json import MAX_MEMBERS, MalformedJson, loads

CONNECT_SECONDS = 3.0
EXCHANGE_SECONDS = 10.0
TOKEN_LIMIT = 64 * 1024  # bytes
TOO_LARGE = "too_large"
KEYS_LIMIT = 256 * 1024
# Of httpx, in seconds; the clock's deadline holds for all of an exchange.
TIMEOUTS = {"timeout": {"connect": CONNECT_SECONDS}}


# Each issuer limits its own connections; with a shared limit one that hangs would stop the others.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=50)


class ProviderClient(httpx.AsyncClient):
    """A client that `exchange` need not use: what it adds to its transport, exchanges do not need.

    `direct` is that transport, or None if the environment names a proxy.
    """

    direct: httpx.AsyncBaseTransport | None = None


def open_client(
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    pool: Callable[[ssl.SSLContext], httpx.AsyncBaseTransport] | None = None,
) -> ProviderClient:
    """A client for providers; tests pass a `MockTransport`.

    It follows no redirect, keeps no cookie and logs no URL. `pool` makes the transport, httpx's own if it
    is not set.
    """
    for name in ("httpx", "httpcore"):
        # At INFO httpx logs each URL with its query.
        logging.getLogger(name).setLevel(logging.WARNING)
    # Loading the authorities takes 20 ms.
    context = _tls_context() if transport is None else None
    direct = (pool or _pool)(context) if context else transport
    proxied = transport is None and bool({"https", "all"} & getproxies().keys())
    client = ProviderClient(
        transport=None if proxied else direct,
        # http:// is for loopback addresses only, which never go through a proxy.
        mounts={"http://": direct} if proxied else None,
        verify=context or True,
        timeout=httpx.Timeout(EXCHANGE_SECONDS, connect=CONNECT_SECONDS),
        limits=_LIMITS,
        follow_redirects=False,
        # A cookie set for one org must not travel with another org's request.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        # A compressed response could exceed any limit while it is read.
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )
    client.direct = None if proxied else direct
    return client


def _tls_context() -> ssl.SSLContext:
    """Mozilla's authorities for images that have none, and the system's, which may include a private CA."""
    context = httpx.create_ssl_context()
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _pool(context: ssl.SSLContext) -> httpx.AsyncBaseTransport:
    return httpx.AsyncHTTPTransport(verify=context, limits=_LIMITS)


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete response; the repr omits its body, which may hold a token."""

    status: int
    headers: httpx.Headers = field(repr=False)
    content: bytes = field(repr=False)

    def json_object(self, *, max_members: int = MAX_MEMBERS) -> dict[str, Any]:
        """The body's JSON object, empty if it is another JSON value; raises MalformedJson."""
        body = loads(self.content, max_members=max_members)
        return body if isinstance(body, dict) else {}


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    clock: Clock,
    limit: int,
    headers: dict[str, str] | None = None,
    form: bytes | None = None,
    json: bytes | None = None,
) -> Reply | str:
    """Send one request and read the response, of at most `limit` bytes, within ten seconds.

    `form` and `json` are encoded bodies; pass one of them at most.

    A failure is returned as unreachable, timeout, too_large, encoded or protocol, not raised:
    httpx's exceptions carry the request, and with it the secret in its body. Of an error whose body is too
    large, status and headers are returned.
    """

    body = json if form is None else form
    sent = [*client.headers.raw]
    if body is not None:
        kind = b"application/json" if form is None else b"application/x-www-form-urlencoded"
        sent.append((b"Content-Type", kind))
    sent += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    task, late = asyncio.current_task(), False

    def stop() -> None:
        nonlocal late
        late = task is not None and task.cancel()

    deadlines = _deadlines_of(client, clock)
    deadline = deadlines.add(stop)
    try:
        request = httpx.Request(method, _parsed(url), headers=sent, content=body, extensions=TIMEOUTS)
        return await _send(client, request, limit)
    except asyncio.CancelledError:
        if late and task is not None and task.uncancel() == 0:
            return "timeout"
        raise
    except httpx.TimeoutException:
        return "timeout"
    except httpx.ConnectError:
        return "unreachable"
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError):
        return "protocol"
    finally:
        deadlines.discard(deadline)


class Timeouts:
    """Calls functions, each `seconds` after it was added, unless it is discarded before.

    All over one sleeping task: a task for each request costs as much as verifying a token.
    """

    def __init__(self, seconds: float, *, clock: Clock) -> None:
        self._seconds = seconds
        self.clock = clock
        self._numbers = itertools.count()
        # In the order of their times, monotonic.
        self._open: dict[int, tuple[float, Callable[[], object]]] = {}
        self._waiting: asyncio.Task[None] | None = None

    def add(self, call: Callable[[], object]) -> int:
        """Its number, for `discard`."""
        number = next(self._numbers)
        self._open[number] = (self.clock.monotonic() + self._seconds, call)
        loop = asyncio.get_running_loop()
        if self._waiting is None or self._waiting.done() or self._waiting.get_loop() is not loop:
            self._waiting = loop.create_task(self._wait(), context=contextvars.Context())
        return number

    def discard(self, number: int) -> bool:
        """Whether it has not been called."""
        return self._open.pop(number, None) is not None

    async def _wait(self) -> None:
        while self._open:
            number, (due_at, call) = next(iter(self._open.items()))
            left = due_at - self.clock.monotonic()
            if left > 0:
                await self.clock.sleep(left)
            elif self.discard(number):
                call()


def _deadlines_of(client: httpx.AsyncClient, clock: Clock) -> Timeouts:
    """The deadlines of a client's exchanges."""
    known = _deadlines.get(client)
    if known is None or known.clock is not clock:
        known = _deadlines[client] = Timeouts(EXCHANGE_SECONDS, clock=clock)
    return known


_deadlines: WeakKeyDictionary[httpx.AsyncClient, Timeouts] = WeakKeyDictionary()


async def _send(client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Reply | str:
    """The response, or a code for what is wrong with it; raises as httpx does."""
    direct = client.direct if isinstance(client, ProviderClient) else None
    if direct is None or any(client.event_hooks.values()):
        response = await client.send(request, stream=True)
    else:
        response = await direct.handle_async_request(request)
    try:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            return "encoded"
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > limit:
                return _cut(response)
        return Reply(response.status_code, response.headers, bytes(content))
    finally:
        await response.aclose()


def _cut(response: httpx.Response) -> Reply | str:
    """A response whose body is too large: an error without its body, or a code."""
    if response.status_code >= 300:
        return Reply(response.status_code, response.headers, b"")
    # A page is not the answer of a token endpoint or an API.
    is_page = response.headers.get("content-type", "").lower().startswith("text/html")
    return "protocol" if is_page else TOO_LARGE


def what_failed(code: str) -> str:
    """The failure that `exchange` returned, for a message that begins with who was asked."""
    return "its answer is too large" if code == TOO_LARGE else f"did not respond: {code}"


@lru_cache(256)
def _parsed(url: str) -> httpx.URL:
    return httpx.URL(url)


async def fetch_json(
    client: httpx.AsyncClient, url: str, *, clock: Clock, limit: int
) -> dict[str, Any] | str:
    """The JSON object at a URL (empty for another JSON value), or a code for what is wrong."""
    reply = await exchange(client, "GET", url, clock=clock, limit=limit)
    if isinstance(reply, str):
        return reply
    if reply.status != 200:
        return f"status_{reply.status}"
    try:
        return reply.json_object()
    except MalformedJson as malformed:
        return malformed.code
