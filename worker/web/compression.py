"""Compression: gzip for large answers, made outside of the event loop if it takes long.

Compressing a secret beside text that an attacker chooses would reveal it by the length
(BREACH). The API's answers hold no secret. The only secret of a page is its CSRF token, which is
new in each answer.
"""

from __future__ import annotations

import asyncio
import gzip

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Smaller answers fit into one packet anyway; larger ones than INLINE are compressed in a thread.
LEAST = 1_400
INLINE = 48 * 1024
LEVEL = 5
_TYPES = ("application/json", "application/problem+json", "text/html", "text/css", "text/javascript")


class Compression:
    """ASGI middleware: compresses whole answers; streams pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _accepts(Headers(scope=scope).get("accept-encoding", "")):
            await self._app(scope, receive, send)
            return
        start: Message | None = None

        async def compress(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _may_compress(MutableHeaders(scope=message)):
                start = message
                return
            if message["type"] == "http.response.body" and start is not None:
                head, start = start, None
                headers, body = MutableHeaders(scope=head), message.get("body", b"")
                headers.add_vary_header("Accept-Encoding")
                if len(body) >= LEAST and not message.get("more_body", False):
                    body = await _gzip(body)
                    headers["content-encoding"] = "gzip"
                    headers["content-length"] = str(len(body))
                    if headers.get("etag", "W/").startswith('"'):
                        # Another encoding has other bytes: only a weak ETag names both.
                        headers["etag"] = f"W/{headers['etag']}"
                    message = {**message, "body": body}
                await send(head)
            await send(message)

        await self._app(scope, receive, compress)


def _may_compress(headers: MutableHeaders) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip()
    return kind in _TYPES and "content-encoding" not in headers


async def _gzip(body: bytes) -> bytes:
    if len(body) <= INLINE:
        return gzip.compress(body, LEVEL, mtime=0)
    return await asyncio.get_running_loop().run_in_executor(None, lambda: gzip.compress(body, LEVEL, mtime=0))


def _accepts(header: str) -> bool:
    """Whether the client accepts gzip (RFC 9110, section 12.5.3)."""
    for part in header.split(","):
        coding, _, parameters = part.strip().lower().partition(";")
        if coding.strip() in ("gzip", "x-gzip", "*"):
            weight = parameters.replace(" ", "").removeprefix("q=")
            return weight.rstrip("0.") != "" if weight.startswith("0") else True
    return False
