"""Handlers that do the same wherever they run; copied into a distribution of its own.

Each is there twice: `form.NAME` in a process of its own, and `form.NAME.inline`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from worker import Cancel, Context, PermanentError, Retry, Snooze, job

Handler = Callable[[Context[Any, Any]], Awaitable[Any]]


async def succeeds(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Log, report progress, and return what it was given."""
    ctx.log.warning("logged by %s", ctx.org.code)
    ctx.progress(1, 2, "half")
    return {
        "org": [ctx.org.code, ctx.org.name],
        "params": dict(ctx.params),
        "settings": dict(ctx.settings),
        "flag": ctx.flag("agent-v2"),
        "attempt": ctx.run.attempt,
    }


async def continues(ctx: Context[Any, Any]) -> Any:
    """Save, and ask for another attempt, which begins where this one saved and repeats no step."""
    done = (ctx.checkpoint or {"done": 0})["done"]
    first = await ctx.step("draw", lambda: {"attempt": ctx.run.attempt})
    await ctx.save({"done": done + 1})
    if done < 1:
        return Retry("10ms", "once more")
    return {"done": done, "first": first}


async def fails(ctx: Context[Any, Any]) -> None:
    """Fail for good."""
    raise PermanentError(f"no use for {ctx.org.code}")


async def snoozes(ctx: Context[Any, Any]) -> Any:
    return Snooze("10ms") if ctx.run.attempt == 1 else "awake"


async def cancels(ctx: Context[Any, Any]) -> Any:
    return Cancel("not needed")


async def waits(ctx: Context[Any, Any]) -> Any:
    """Wait for an answer, without a process or a task."""
    return {"answer": await ctx.wait_for("approval")}


async def remembers(ctx: Context[Any, Any]) -> int:
    """Count the runs of its definition, and spend something."""
    await ctx.spend("form_calls", 3)
    ctx.state["runs"] = ctx.state.get("runs", 0) + 1
    count: int = ctx.state["runs"]
    return count


async def renews(ctx: Context[Any, Any]) -> str:
    """Go on until its token is renewed."""
    first = (await ctx.token()).reveal()
    while (await ctx.token()).reveal() == first:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return "renewed"


async def lasts(ctx: Context[Any, Any]) -> None:
    """Run until it is stopped."""
    ctx.log.info("begun")
    await asyncio.sleep(3600)


async def grows(ctx: Context[Any, Any]) -> int:
    """Take more memory than it may."""
    return len(b"x" * 512 * 2**20)


def declared(handler: Handler, **keys: Any) -> tuple[Any, Any]:
    name = f"form.{handler.__name__}"
    return job(name, **keys)(handler), job(f"{name}.inline", isolation="inline", **keys)(handler)


succeeds_child, succeeds_inline = declared(succeeds)
continues_child, continues_inline = declared(continues)
fails_child, fails_inline = declared(fails)
snoozes_child, snoozes_inline = declared(snoozes)
cancels_child, cancels_inline = declared(cancels)
waits_child, waits_inline = declared(waits)
remembers_child, remembers_inline = declared(remembers, state=True)
renews_child, renews_inline = declared(renews)
lasts_child, lasts_inline = declared(lasts)
grows_child, grows_inline = declared(grows, memory="256MiB", max_attempts=1)
