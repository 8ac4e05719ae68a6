"""A plug-in with a sealed handler, for tests of what is deployed; the arguments of `make_plugin`."""

from __future__ import annotations

from typing import Any

_SOURCE = """
import asyncio, socket
from worker import Context, job

@job("acme.asks", egress=["api"], max_attempts=1)
async def asks(ctx: Context):
    "Two requests, `seconds` apart, and a socket of its own."
    first = await ctx.http.get(f"{ctx.params['url']}/first")
    await asyncio.sleep(ctx.params["seconds"])
    second = await ctx.http.get(f"{ctx.params['url']}/second")
    try:
        socket.socket()
    except OSError as error:
        refused = type(error).__name__
    return {"statuses": [first.status_code, second.status_code], "socket": refused}
"""
ASKS: dict[str, Any] = {
    "dist": "acme-asks",
    "modules": {"acme_asks": _SOURCE},
    "entry_points": {"acme.asks": "acme_asks:asks"},
}
