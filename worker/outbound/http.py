"""HTTP to providers: one shared client, a deadline for each exchange, a size limit for each response."""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from worker.clock import Clock
from worker.outbound.strict_json import MAX_MEMBERS, Malformed, loads

CONNECT_SECONDS = 3.0
EXCHANGE_SECONDS = 10.0
TOKEN_LIMIT = 64 * 1024  # bytes
KEYS_LIMIT = 256 * 1024


def open_client(transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """The client that all issuers share; tests pass a `MockTransport`.

    It follows no redirect, keeps no cookie and logs no URL.
    """
    for name in ("httpx", "httpcore"):
        # At INFO httpx logs each URL with its query.
        logging.getLogger(name).setLevel(logging.WARNING)
    # Mozilla's authorities for images that have none, and the system's, which may include a private CA.
    context = httpx.create_ssl_context()
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    # http:// is for loopback addresses only, which never go through a proxy.
    direct = None if transport else {"http://": httpx.AsyncHTTPTransport(verify=context)}
    return httpx.AsyncClient(
        transport=transport,
        mounts=direct,
        verify=context,
        timeout=httpx.Timeout(EXCHANGE_SECONDS, connect=CONNECT_SECONDS),
        # Each issuer limits its own connections; with a shared limit one that hangs would stop the others.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=50),
        follow_redirects=False,
        # A cookie set for one org must not travel with another org's request.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        # A compressed response could exceed any limit while it is read.
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete response; the repr omits its body, which may hold a token."""

    status: int
    headers: httpx.Headers = field(repr=False)
    content: bytes = field(repr=False)

    def json_object(self, *, max_members: int = MAX_MEMBERS) -> dict[str, Any]:
        """The body's JSON object, empty if it is another JSON value; raises Malformed."""
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
    httpx's exceptions carry the request, and with it the secret in its body.
    """

    async def send() -> Reply | str:
        try:
            async with client.stream(method, url, headers=headers, content=body) as response:
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    return "encoded"
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > limit:
                        return "too_large"
                return Reply(response.status_code, response.headers, bytes(content))
        except httpx.TimeoutException:
            return "timeout"
        except httpx.ConnectError:
            return "unreachable"
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError):
            return "protocol"

    body = json if form is None else form
    if body is not None:
        kind = "application/json" if form is None else "application/x-www-form-urlencoded"
        headers = {**(headers or {}), "Content-Type": kind}
    exchanging = asyncio.ensure_future(send())
    deadline = asyncio.ensure_future(clock.sleep(EXCHANGE_SECONDS))
    try:
        await asyncio.wait({exchanging, deadline}, return_when=asyncio.FIRST_COMPLETED)
        return exchanging.result() if exchanging.done() else "timeout"
    finally:
        exchanging.cancel()
        deadline.cancel()
        await asyncio.gather(exchanging, deadline, return_exceptions=True)


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
    except Malformed as malformed:
        return malformed.code


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
