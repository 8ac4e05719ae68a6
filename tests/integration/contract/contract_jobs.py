"""A handler that does what its params say, one call of `ctx` after another, async and blocking.

A call is `[name, *arguments]`; `$token` in an argument is the run's token. The result is what each call gave,
or the type of the error that it raised.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from worker import BlockingContext, ChildFailed, Context, Retry, job

# How often a step's function was called in this attempt.
Calls = list[Any]


def plain(value: Any) -> Any:
    """A result as JSON; a token is only named."""
    return "a token" if type(value).__name__ == "AccessToken" else value


def calls_of(ctx: Any, token: str) -> Iterator[list[Any]]:
    yield from json.loads(json.dumps(ctx.params["calls"]).replace("$token", token))


def started(ctx: Any, done: Calls, name: str, args: list[Any]) -> Any:
    """What the call of `ctx` returns: a value, or a coroutine of an async one."""
    match name:
        case "step":
            step, value, *key = args

            def compute() -> Any:
                done.append(step)
                return value

            return ctx.step(step, compute, **({"key": key[0]} if key else {}))
        case "spending step":
            step, *spends = args

            def use() -> None:
                for meter, amount, named in spends:
                    ctx.spend(meter, amount, **named)

            return ctx.step(step, use)
        case "map":
            step, count = args
            return ctx.map(step, lambda n: n, list(range(count)))
        case "spend" if len(args) > 2:
            meter, amount, named = args
            return ctx.spend(meter, amount, **named)
        case "budget":
            return ctx.budget(*args)
        case "secret" | "progress":
            return getattr(ctx, name)(*args)
        case "log":
            return ctx.log.warning(*args)
        case "wait_for":
            wait, options = args
            return ctx.wait_for(wait, **options)
        case "state":
            return ctx.state.update(*args)
        case "start":
            ctx.start("acme.script", *args)
            return None
        case "gather" | "as_ended":
            keys, *options = args
            children = [ctx.start("acme.script", {"calls": []}, key=key) for key in keys]
            return getattr(ctx, name)(children, *options)
        case "map_runs":
            [count, concurrency] = args
            items = [{"calls": [], "n": n} for n in range(count)]
            return ctx.map_runs("acme.script", items, concurrency=concurrency)
    return getattr(ctx, name)(*args)


def shown_child(found: Any) -> Any:
    """What a child returned, its key and what it returned, or the error that is in its place."""
    if isinstance(found, ChildFailed):
        return [type(found).__name__, found.state, found.reason]
    return [found.child.key, found.result] if hasattr(found, "child") else found


def outcome(ctx: Any, given: list[Any], done: Calls) -> Any:
    if ctx.params.get("retries") and ctx.run.attempt == 1:
        return Retry(0)
    return {"given": given, "done": done}


def shown(ctx: Any, error: Exception) -> str:
    if ctx.params.get("raises") or isinstance(error, (TypeError, AttributeError)):
        raise error
    return type(error).__name__


CHILDREN = {"children": {"acme.script"}}


@job("acme.script", **CHILDREN)
async def script(ctx: Context[Any, Any]) -> Any:
    given, done = [], Calls()
    for name, *args in calls_of(ctx, (await ctx.token()).reveal()):
        try:
            value = started(ctx, done, name, args)
            if hasattr(value, "__aiter__"):
                value = [shown_child(each) async for each in value]
            if asyncio.iscoroutine(value) or hasattr(value, "__await__"):
                value = await value
            given.append(plain(value))
        except Exception as error:
            given.append(shown(ctx, error))
    return outcome(ctx, given, done)


@job("acme.script", **CHILDREN)
def script_blocking(ctx: BlockingContext[Any, Any]) -> Any:
    given, done = [], Calls()
    for name, *args in calls_of(ctx, ctx.token().reveal()):
        try:
            value = started(ctx, done, name, args)
            if hasattr(value, "__next__"):
                value = [shown_child(each) for each in value]
            given.append(plain(value))
        except Exception as error:
            given.append(shown(ctx, error))
    return outcome(ctx, given, done)
