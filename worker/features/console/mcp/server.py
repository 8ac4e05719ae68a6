"""The endpoint /mcp: streamable HTTP of the official SDK, one request at a time, without sessions.

The only module that imports the SDK. Each request has a transport of its own that ends with it, so nothing is
kept between requests, and a fault of the SDK ends one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from worker.features.console.callers import Caller, caller_of
from worker.features.console.mcp.tools import INSTRUCTIONS, TOOLS, McpTools
from worker.kit.web.responses import MAX_BYTES

# What a client on this machine calls it. The port may be another one by a tunnel or a container.
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Mcp:
    """An ASGI application for POST; `AuthMiddleware` has found the caller, by a bearer token only."""

    def __init__(self, tools: McpTools, public_url: str, hosts: Sequence[str]) -> None:
        """`hosts` are further names by which clients may reach it, with their ports."""
        self._tools = tools
        self._public_url = public_url.rstrip("/")
        self._security = security_of(public_url, hosts)
        self._server: Server[dict[str, Any]] = Server(
            "orgworker",
            version=version("orgworker"),
            instructions=INSTRUCTIONS,
            on_list_tools=self._list,
            on_call_tool=self._call,
        )
        # Its spans would name arguments.
        self._server.middleware.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        manager = StreamableHTTPSessionManager(
            self._server,
            stateless=True,
            json_response=True,
            security_settings=self._security,
            max_request_body_size=MAX_BYTES,
        )
        async with manager.run():
            await manager.handle_request(scope, receive, send)

    async def _list(
        self,
        context: ServerRequestContext[dict[str, Any], Request],
        given: types.PaginatedRequestParams | None,
    ) -> types.ListToolsResult:
        caller = _caller(context)
        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.about,
                    input_schema=dict(tool.parameters),
                    annotations=types.ToolAnnotations(
                        read_only_hint=not tool.is_plan, destructive_hint=False, open_world_hint=False
                    ),
                )
                for tool in TOOLS.values()
                if tool.may_call(caller)
            ]
        )

    async def _call(
        self, context: ServerRequestContext[dict[str, Any], Request], given: types.CallToolRequestParams
    ) -> types.CallToolResult:
        request = _request(context)
        console = self._public_url or f"http://{request.headers['host']}"
        answer = await self._tools.call(caller_of(request), given.name, given.arguments or {}, console)
        content: list[types.ContentBlock] = [
            types.TextContent(type="text", text=text) for text in answer.texts
        ]
        return types.CallToolResult(content=content, is_error=answer.is_error)


def security_of(public_url: str, hosts: Sequence[str]) -> TransportSecuritySettings:
    """Against DNS rebinding: the values of Host and Origin that are accepted."""
    parts = urlsplit(public_url)
    names = [*(f"{name}:*" for name in LOCAL), *hosts]
    origins = [f"http://{name}:*" for name in LOCAL]
    if parts.netloc:
        names.append(parts.netloc)
        origins.append(f"{parts.scheme}://{parts.netloc}")
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=True, allowed_hosts=names, allowed_origins=origins
    )


def _request(context: ServerRequestContext[dict[str, Any], Request]) -> Request:
    if context.request is None:
        raise RuntimeError("the SDK gave no request")
    return context.request


def _caller(context: ServerRequestContext[dict[str, Any], Request]) -> Caller:
    return caller_of(_request(context))
