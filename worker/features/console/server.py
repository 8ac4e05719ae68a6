"""The HTTP applications of a worker and of `provision`."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.clock import Clock
from worker.features.console.access import Access
from worker.features.console.api import Api
from worker.features.console.callers import CallerDatabase, EditDefinition, OpenRing, no_ring
from worker.features.console.live import Live
from worker.features.console.live_lists import LiveLists
from worker.features.console.login import Login
from worker.features.console.mcp import PATH as MCP
from worker.features.console.mcp.tools import McpTools
from worker.features.console.pages import Console
from worker.features.console.sessions import AuthMiddleware, Forms, Sessions
from worker.kit.web.health import Health
from worker.kit.web.listener import RequestLimit
from worker.kit.web.responses import ErrorMiddleware
from worker.operations.definitions import edit_definition
from worker.store.database import Database

# Smaller answers fit into one packet anyway; larger ones than INLINE are compressed in a thread.
LEAST = 1_400
INLINE = 48 * 1024
LEVEL = 5
_TYPES = ("application/json", "application/problem+json", "text/html", "text/css", "text/javascript")


class _LogoutAtProvider:
    """ASGI middleware: lets the pages' forms lead to the provider, where people are logged out."""

    def __init__(self, app: ASGIApp, origin: str) -> None:
        self._app = app
        self._widened = f"form-action 'self' {origin}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_widened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, value.replace(b"form-action 'self'", self._widened))
                    if name == b"content-security-policy"
                    else (name, value)
                    for name, value in message["headers"]
                ]
            await send(message)

        await self._app(scope, receive, send_widened)


class Compression:
    """ASGI middleware: compresses whole answers, outside of the event loop if it takes long.

    Streams pass as they are. Compressing a secret beside text that an attacker chooses would reveal it by the
    length (BREACH). The API's answers hold no secret. The only secret of a page is its CSRF token, which is
    new in each answer.
    """

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


def build(
    health: Health,
    database: Database,
    access: Access,
    clock: Clock,
    *,
    public_url: str = "",
    with_health: bool = True,
    login: Login | None = None,
    edit: EditDefinition = edit_definition,
    open_ring: OpenRing = no_ring,
    secrets_dir: Path | None = None,
    installation: str = "",
    mcp_hosts: Sequence[str] | None = None,
    org_usage: bool = False,
) -> ASGIApp:
    """The application; browsers reach it at `public_url`, and people log in by `login`.

    Without `with_health`, health has a listener of its own. With `mcp_hosts` it has /mcp, which clients may
    reach by these names, too. With `org_usage` orgs see what their runs cost. The rest is what
    `CallerDatabase` needs for changes.
    """
    health.protect(access)
    sessions, forms = Sessions(database, clock), Forms(public_url, access.addresses)
    caller_database = CallerDatabase(database, edit=edit, open_ring=open_ring, secrets_dir=secrets_dir)
    live = Live(caller_database, clock, health.draining)
    console = Console(
        *(caller_database, clock, access, sessions, forms),
        login=login,
        installation=installation,
        org_usage=org_usage,
    )
    api = Api(caller_database, clock, live.events, installation=installation, org_usage=org_usage)
    routes = [
        *(health.routes() if with_health else ()),
        *api.routes(),
        Route("/runs/{run}/live", live.events),
        *LiveLists(live, clock, console.zone).routes(),
        *console.routes(),
    ]
    if mcp_hosts is not None:
        # An extra, and only where it is used: it loads a second HTTP client.
        from worker.features.console.mcp.server import Mcp

        tools = McpTools(api, caller_database, clock)
        routes.append(Route(MCP, Mcp(tools, public_url, mcp_hosts), methods=["POST"]))
    router = Router(routes=routes, redirect_slashes=False)
    limited = RequestLimit(AuthMiddleware(router, access, sessions, forms), health)
    app: ASGIApp = Compression(ErrorMiddleware(limited, console.error_page))
    return app if login is None else _LogoutAtProvider(app, login.origin)
