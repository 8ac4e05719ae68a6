"""Ways out: each function tries one, with all that the run has of its token and secret.

It is a plug-in too. What a way returns is the run's result, which is a sink itself.
"""

from __future__ import annotations

from typing import Any

from worker import Context, job

from . import inside, requests, sockets
from .common import WAYS

__all__ = ["WAYS", "inside", "requests", "sockets"]


@job("ways", secrets={"KEY"})
async def ways(ctx: Context[Any, Any]) -> Any:
    """Try one way."""
    has = f"{ctx.params['marker']} {(await ctx.token()).reveal()} {ctx.secret('KEY')} ".encode()
    return await WAYS[ctx.params["way"]](ctx, ctx.params["places"], has)
