"""Handlers of the tests of egress, in a plug-in of their own."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from worker import BlockingContext, Context, job


@job("get")
async def get(ctx: Context[Any, Any]) -> Any:
    """GET a URL with headers; the answer's body as text."""
    response = await ctx.http.get(ctx.params["url"], headers=ctx.params.get("headers", {}))
    return {"status": response.status_code, "text": response.text, "headers": dict(response.headers)}


@job("blocking_get")
def blocking_get(ctx: BlockingContext[Any, Any]) -> Any:
    """The same, by a handler that blocks."""
    response = ctx.http.get(ctx.params["url"], headers=ctx.params.get("headers", {}))
    return {"status": response.status_code, "text": response.text, "headers": dict(response.headers)}


@job("reveal")
async def reveal(ctx: Context[Any, Any]) -> str:
    """What the handler gets as its token."""
    return (await ctx.token()).reveal()


@job("connect")
def connect(ctx: BlockingContext[Any, Any]) -> str:
    """Open a connection of its own."""
    with socket.create_connection((ctx.params["host"], ctx.params["port"]), timeout=5):
        return "connected"


@job("get_twice")
async def get_twice(ctx: Context[Any, Any]) -> list[int]:
    """Two requests, with a call in between."""
    first = await ctx.http.get(ctx.params["url"])
    await ctx.save({})
    second = await ctx.http.get(ctx.params["url"])
    return [first.status_code, second.status_code]


@job("look", secrets={"KEY"})
async def look(ctx: Context[Any, Any]) -> None:
    """Two requests with the token and the secret, and the process's id."""
    headers = {"X-Pid": str(os.getpid()), "X-Key": ctx.secret("KEY")}
    for path in ("/first", "/look"):
        await ctx.http.get(f"{ctx.params['url']}{path}", headers=headers)


@job("get_given")
async def get_given(ctx: Context[Any, Any]) -> int:
    """A request by a run that may pass no descriptor, as the kernel says where an account has too many."""

    def too_many(*_: Any) -> int:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    socket.send_fds = too_many
    return (await ctx.http.get(ctx.params["url"])).status_code
