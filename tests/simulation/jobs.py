"""What the simulated orgs run. Handlers write what they do to the journal, as the outside world sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from pydantic import BaseModel

from tests.simulation.loop import process_now
from tests.simulation.models import MODEL
from tests.simulation.service import FREE, LIMITED, Seen
from worker import (
    ChildFailed,
    Context,
    HandBack,
    PermanentError,
    RateLimited,
    Retry,
    Snooze,
    WaitTimeout,
    job,
)
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.describe import offer_of
from worker.handlers.job import Job

DISTRIBUTION = "simulated-jobs"
FLAG = "second-version"
# What each child spends one of, and the children that `sim.mapped` has unfinished at a time.
PAGES = "pages"
WINDOW = 2


class Journal:
    """What handlers did, in order; `now` is the time outside of all processes."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._now = now

    def write(self, ctx: Context[Any, Any], who: str, **fields: Any) -> None:
        process = process_now()
        self.lines.append(
            {
                "run": ctx.run.id,
                "attempt": ctx.run.attempt,
                "fencing_token": ctx.run.fencing_token,
                "org": ctx.org.code,
                "token_of": ctx.claims.org_code,
                "who": who,
                "at": self._now(),
                "by": "" if process is None else process.name,
                **fields,
            }
        )
        if process is not None:
            process.loop.note(process, f"{who} {fields or ''} by attempt {ctx.run.attempt} of {ctx.run.id}")

    def seen(self, seen: Seen) -> None:
        """A service has seen a request of an attempt."""
        of = {"run": seen.run, "attempt": seen.attempt, "org": seen.org, "token_of": seen.org}
        self.lines.append({**of, "who": "seen", "number": seen.number, "at": seen.at})


JOURNAL = Journal(lambda: 0.0)


def write(ctx: Context[Any, Any], who: str, **fields: Any) -> None:
    JOURNAL.write(ctx, who, **fields)


@job("sim.note")
async def note(ctx: Context[Any, Any]) -> None:
    """Act once."""
    write(ctx, "effect")


@job("sim.acts")
async def acts(ctx: Context[Any, Any]) -> None:
    """Act once a second for `seconds`, without a word to the worker."""
    for _ in range(ctx.params["seconds"]):
        write(ctx, "effect")
        await asyncio.sleep(1.0)


@job("sim.saves")
async def saves(ctx: Context[Any, Any]) -> None:
    """Save one number after another, from where the last attempt was. The first two rest then, and fail."""
    first = (ctx.checkpoint or {"step": 0})["step"]
    write(ctx, "start", first=first)
    for step in range(first + 1, ctx.params["steps"] + 1):
        write(ctx, "saving", step=step)
        await ctx.save({"step": step})
        write(ctx, "saved", step=step)
        await asyncio.sleep(ctx.params.get("pause", 0.3))
        if ctx.cancelled.is_set() and ctx.cancelled.reason == "drain":
            return HandBack()  # type: ignore[return-value]
    if ctx.run.attempt <= 2:
        await asyncio.sleep(ctx.params["rest"])
        raise ConnectionError("flaky")


@job("sim.pays")
async def pays(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Pay for one step after another, half of them side by side, and spend of a meter in each."""

    async def pay(number: int) -> int:
        write(ctx, "paid", step=number)
        await asyncio.sleep(ctx.params["pause"])
        await ctx.spend("calls", 1)
        return number * number

    steps = ctx.params["steps"]
    found = [await ctx.step("pay", pay, number, key=number) for number in range(steps)]
    found += await ctx.map("more", pay, range(steps, 2 * steps), concurrency=3, key=lambda number: number)
    if found != [number * number for number in range(2 * steps)]:
        write(ctx, "wrong", found=found)
    return {"sum": sum(found)}


@job("sim.counts", state=True)
async def counts(ctx: Context[Any, Any]) -> None:
    """Add one to the state of the definition, once for each run that succeeds."""
    write(ctx, "counting", total=ctx.state.get("total", 0))
    await asyncio.sleep(0.2)
    ctx.state["total"] = ctx.state.get("total", 0) + 1
    ctx.state["runs"] = [*ctx.state.get("runs", [])[-500:], ctx.run.id]


@job("sim.retries")
async def retries(ctx: Context[Any, Any]) -> Any:
    """Fail as a flaky API does: by the attempt, so that a later one succeeds."""
    write(ctx, "effect")
    await asyncio.sleep(0.1)
    match ctx.run.attempt % 4:
        case 1:
            raise ConnectionError("flaky")
        case 2:
            return Retry(1.5)
        case 3 if not (ctx.checkpoint or {}).get("slept"):
            await ctx.save({"slept": True})
            return Snooze(2)
    return {"attempt": ctx.run.attempt}


@job("sim.fails")
async def fails(ctx: Context[Any, Any]) -> None:
    """Fail for good."""
    write(ctx, "effect")
    raise PermanentError("as always")


@job("sim.asks")
async def asks(ctx: Context[Any, Any]) -> Any:
    """Pay, sleep without a process, ask a person, pay again."""

    async def pay(number: int) -> int:
        write(ctx, "paid", step=number)
        return number

    await ctx.step("before", pay, 1, key=1)
    await ctx.sleep(2)
    try:
        given = await ctx.wait_for(
            "approval", timeout="40s", ask={"question": "go on?"}, options=["yes", "no"]
        )
        write(ctx, "given", answer=given)
    except WaitTimeout:
        given = "nobody"
    await ctx.step("after", pay, 2, key=2)
    return given


@job("sim.versioned")
async def versioned(ctx: Context[Any, Any]) -> str:
    """Say which version it is."""
    write(ctx, "effect", version=1)
    return "first"


@job("sim.versioned_2")
async def versioned_2(ctx: Context[Any, Any]) -> str:
    write(ctx, "effect", version=2)
    return "second"


async def _roll(ctx: Context[Any, Any], version: int) -> None:
    write(ctx, "version", version=version)
    if ctx.run.attempt == 1:
        await asyncio.sleep(ctx.params["rest"])
        raise ConnectionError("flaky")


@job("sim.rolled")
async def rolled(ctx: Context[Any, Any]) -> None:
    """Say which version it is, rest, and fail; a later attempt succeeds, by then perhaps after a halt."""
    await _roll(ctx, 1)


@job("sim.rolled_2")
async def rolled_2(ctx: Context[Any, Any]) -> None:
    await _roll(ctx, 2)


@job("sim.calls")
async def calls(ctx: Context[Any, Any]) -> None:
    """Call both services some times, in lanes side by side. What is refused or lost is not called again."""

    async def lane(place: int) -> None:
        for turn in range(ctx.params["turns"]):
            number = f"{place}.{turn}"
            origin = FREE if (place + turn) % 3 == 2 else LIMITED
            headers = {
                "x-run": ctx.run.id,
                "x-attempt": str(ctx.run.attempt),
                "x-org": ctx.org.code,
                "x-number": number,
            }
            write(ctx, "calls", number=number, origin=origin)
            try:
                response = await ctx.http.get(f"{origin}/things", headers=headers)
            except RateLimited as limited:
                write(ctx, "limited", number=number, origin=origin, seconds=limited.retry_after)
            except httpx.TransportError as error:
                write(ctx, "lost", number=number, origin=origin, error=type(error).__name__)
            else:
                write(ctx, "called", number=number, origin=origin, status=response.status_code)
            await asyncio.sleep(ctx.params["rest"])

    async with asyncio.TaskGroup() as lanes:
        for place in range(ctx.params["lanes"]):
            lanes.create_task(lane(place))


@job("sim.completes")
async def completes(ctx: Context[Any, Any]) -> None:
    """Ask a model turn by turn. The request says whose it is, and the response has to repeat that."""
    for turn in range(ctx.params["turns"]):
        said = f"{ctx.org.code} {ctx.run.id} {turn}"
        request: dict[str, Any] = {"model": MODEL}
        if ctx.params["via"] == "openai":
            request |= {"input": said, "max_output_tokens": ctx.params["most"]}
        else:
            request |= {"messages": [{"role": "user", "content": said}], "max_tokens": ctx.params["most"]}
        found = await ctx.complete(request, via=ctx.params["via"], key=turn)
        parts = found["output"][0]["content"] if "output" in found else found["content"]
        write(ctx, "completed", turn=turn, text=parts[0]["text"], id=found["id"])


class Numbered(BaseModel):
    number: int


@job("sim.started", params=Numbered)
async def started(ctx: Context[Numbered, Any]) -> None:
    """Say which number a product has started it with."""
    write(ctx, "effect", number=ctx.params.number)


@job("sim.leaf")
async def leaf(ctx: Context[Any, Any]) -> dict[str, Any]:
    """A child: spend, fail as `number` says, and return what names it."""
    number = ctx.params["number"]
    write(ctx, "leaf", number=number)
    await ctx.spend(PAGES, 1)
    await asyncio.sleep(ctx.params["seconds"])
    if number % 5 == 1 and ctx.run.attempt == 1:
        raise ConnectionError("flaky")
    if number % 5 == 4:
        raise PermanentError("as always")
    return {"number": number, "org": ctx.org.code}


def _leaves(ctx: Context[Any, Any]) -> list[dict[str, Any]]:
    seconds = ctx.params["seconds"]
    return [{"number": number, "seconds": seconds} for number in range(ctx.params["leaves"])]


@job("sim.branch", children={"sim.leaf"})
async def branch(ctx: Context[Any, Any]) -> dict[str, Any]:
    """A child with children."""
    write(ctx, "parent")
    started = [ctx.start("sim.leaf", params, key=params["number"]) for params in _leaves(ctx)]
    found = [one async for one in ctx.gather(started, on_failure="return")]
    _write_results(ctx, [child.key for child in started], found)
    return {"number": ctx.params["number"], "org": ctx.org.code}


@job("sim.tree", children={"sim.leaf", "sim.branch"})
async def tree(ctx: Context[Any, Any]) -> None:
    """Start leaves and a branch, in two batches, and fail once; a later attempt gathers their results."""
    write(ctx, "parent")

    async def pay(number: int) -> int:
        write(ctx, "paid", step=number)
        return number

    leaves = _leaves(ctx)
    started = [ctx.start("sim.leaf", params, key=params["number"]) for params in leaves[::2]]
    await ctx.step("between", pay, 1, key=1)
    started += [ctx.start("sim.leaf", params, key=params["number"]) for params in leaves[1::2]]
    number = len(leaves)
    params = {"number": number, "leaves": 2, "seconds": ctx.params["seconds"]}
    started.append(ctx.start("sim.branch", params, key=number))
    if ctx.run.attempt == 1:
        raise ConnectionError("flaky")
    found = [one async for one in ctx.gather(started, on_failure="return")]
    _write_results(ctx, [child.key for child in started], found)


@job("sim.ended", children={"sim.leaf"})
async def ended(ctx: Context[Any, Any]) -> None:
    """Take its children as they end."""
    write(ctx, "parent")
    started = [ctx.start("sim.leaf", params, key=params["number"]) for params in _leaves(ctx)]
    async for one in ctx.as_ended(started):
        number = None if one.failure is not None else one.result["number"]
        write(ctx, "ended", key=one.child.key, state=one.state, number=number, left=len(started))


@job("sim.mapped", children={"sim.leaf"})
async def mapped(ctx: Context[Any, Any]) -> None:
    """Start a child for each item, at most `WINDOW` at a time."""
    write(ctx, "parent")
    items = _leaves(ctx)
    results = ctx.map_runs(
        "sim.leaf", items, concurrency=WINDOW, key=lambda item: item["number"], on_failure="return"
    )
    found = [one async for one in results]
    _write_results(ctx, [str(item["number"]) for item in items], found)


async def _leave(ctx: Context[Any, Any]) -> None:
    write(ctx, "parent")
    for params in _leaves(ctx):
        ctx.start("sim.leaf", params, key=params["number"])
    raise PermanentError("as always")


@job("sim.leaves", children={"sim.leaf"})
async def leaves(ctx: Context[Any, Any]) -> None:
    """Start children and fail: those that wait end with it."""
    await _leave(ctx)


@job("sim.keeps", children={"sim.leaf"}, keep_children=True)
async def keeps(ctx: Context[Any, Any]) -> None:
    """Start children and fail: they go on."""
    await _leave(ctx)


def _write_results(ctx: Context[Any, Any], keys: list[str | None], found: list[Any]) -> None:
    results = [
        [one.child.key, f"{one.state}: {one.reason}"]
        if isinstance(one, ChildFailed)
        else [str(one["number"]), one["org"]]
        for one in found
    ]
    write(ctx, "results", keys=keys, results=results)


JOBS: dict[str, Job] = {
    f"simulated:{made.name}": made
    for made in (
        *(note, acts, saves, pays, counts, retries, fails, asks, versioned, versioned_2, calls),
        *(started, leaf, branch, tree, ended, mapped, leaves, keeps, rolled, rolled_2, completes),
    )
}


def find(entry_point: str) -> Job:
    return JOBS[entry_point]


def entries() -> list[HandlerEntry]:
    """The catalogue, as a child process would report it."""
    return [
        HandlerEntry(made.name, DISTRIBUTION, "1.0", entry_point, **offer_of(made))
        for entry_point, made in JOBS.items()
    ]
