"""What the simulated orgs run. Handlers write what they do to the journal, as the outside world sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from tests.simulation.loop import process_now
from tests.simulation.service import FREE, LIMITED, Seen
from worker import Context, HandBack, PermanentError, RateLimited, Retry, Snooze, WaitTimeout, job
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.describe import offer_of
from worker.handlers.job import Job

DISTRIBUTION = "simulated-jobs"
FLAG = "second-version"


class Journal:
    """What handlers did, in order; `now` is the time outside of all processes."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._now = now

    def write(self, ctx: Context[Any, Any], who: str, **fields: Any) -> None:
        self.lines.append(
            {
                "run": ctx.run.id,
                "attempt": ctx.run.attempt,
                "fencing_token": ctx.run.fencing_token,
                "org": ctx.org.code,
                "token_of": ctx.claims.org_code,
                "who": who,
                "at": self._now(),
                **fields,
            }
        )
        process = process_now()
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


JOBS: dict[str, Job] = {
    f"simulated:{made.name}": made
    for made in (note, acts, saves, pays, counts, retries, fails, asks, versioned, versioned_2, calls)
}


def find(entry_point: str) -> Job:
    return JOBS[entry_point]


def entries() -> list[HandlerEntry]:
    """The catalogue, as a child process would report it."""
    return [
        HandlerEntry(made.name, DISTRIBUTION, "1.0", entry_point, **offer_of(made))
        for entry_point, made in JOBS.items()
    ]
