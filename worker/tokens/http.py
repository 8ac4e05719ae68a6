"""HTTP as tokens need it: one shared client, one deadline an exchange, a limit to each answer."""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from worker.clock import Clock

CONNECT_SECONDS = 3.0
EXCHANGE_SECONDS = 10.0
TOKEN_LIMIT = 64 * 1024
KEYS_LIMIT = 256 * 1024


def open_client(transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """The one client that all issuers share; tests pass a `MockTransport`.

    It follows no redirect, keeps no cookie and logs no URL.
    """
    for name in ("httpx", "httpcore"):
        # At INFO httpx logs each URL with its query.
        logging.getLogger(name).setLevel(logging.WARNING)
    # Mozilla's authorities for images that have none, and the system's, which may have a company's own.
    context = httpx.create_ssl_context()
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    # http:// is for loopback addresses only, and those are never asked through a proxy.
    direct = None if transport else {"http://": httpx.AsyncHTTPTransport(verify=context)}
    return httpx.AsyncClient(
        transport=transport,
        mounts=direct,
        verify=context,
        timeout=httpx.Timeout(EXCHANGE_SECONDS, connect=CONNECT_SECONDS),
        # Each issuer bounds its own connections; a common bound would let one that hangs stop the others.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=50),
        follow_redirects=False,
        # A cookie of one org's answer must not travel with another's request.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        # Compressed answers could grow past any limit while being read.
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; its body has no readable form, since it may hold a token."""

    status: int
    headers: httpx.Headers = field(repr=False)
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class NoReply:
    """Why there is no whole answer: unreachable, timeout, too_large, encoded, protocol."""

    why: str


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    clock: Clock,
    limit: int,
    headers: dict[str, str] | None = None,
    form: bytes | None = None,
) -> Reply | NoReply:
    """Send one request and read its whole answer within ten seconds.

    A failure is returned, not raised: httpx's exceptions carry the request, and
    with it the secret in its body.
    """
    exchanging = asyncio.ensure_future(_exchange(client, method, url, limit, headers or {}, form))
    deadline = asyncio.ensure_future(clock.sleep(EXCHANGE_SECONDS))
    try:
        await asyncio.wait({exchanging, deadline}, return_when=asyncio.FIRST_COMPLETED)
        return exchanging.result() if exchanging.done() else NoReply("timeout")
    finally:
        exchanging.cancel()
        deadline.cancel()
        await asyncio.gather(exchanging, deadline, return_exceptions=True)


async def _exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    limit: int,
    headers: dict[str, str],
    form: bytes | None,
) -> Reply | NoReply:
    if form is not None:
        headers = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
    try:
        async with client.stream(method, url, headers=headers, content=form) as response:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                return NoReply("encoded")
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > limit:
                    return NoReply("too_large")
            return Reply(response.status_code, response.headers, bytes(content))
    except httpx.TimeoutException:
        return NoReply("timeout")
    except httpx.ConnectError:
        return NoReply("unreachable")
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError):
        return NoReply("protocol")


def asked_wait(headers: httpx.Headers, reset_headers: tuple[str, ...], now: float) -> float | None:
    """Seconds that an answer asks us to wait, or None: Retry-After (RFC 9110, 10.2.3), else a reset header.

    `now` is in seconds since 1970. A reset header may hold seconds from now, or the instant itself.
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


def _seconds(text: str) -> float | None:
    whole, _, fraction = text.partition(".")
    if len(text) > 20 or not text.isascii() or not whole.isdigit() or not (fraction or "0").isdigit():
        return None
    return float(text)
