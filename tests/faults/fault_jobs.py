"""The handlers of the fault suite; copied into a distribution of its own, so it imports only `worker`.

Each writes what it does to the file that `params["journal"]` names, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

from worker import BlockingContext, Context, HandBack, job

# A process of the run's own that writes as often as the run does, and outlives it if nobody kills it.
BESIDE = """
import json, os, sys, time
path, line = sys.argv[1], json.loads(sys.argv[2])
while True:
    entry = line | {"who": "grandchild", "pid": os.getpid(), "at": time.time()}
    journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, (json.dumps(entry) + "\\n").encode())
    os.close(journal)
    time.sleep(0.05)
"""


def of_run(ctx: Any) -> dict[str, Any]:
    return {"run": ctx.run.id, "attempt": ctx.run.attempt, "fencing_token": ctx.run.fencing_token}


def write(ctx: Any, who: str, **fields: Any) -> None:
    """One line in one write, so that the lines of many processes never mix."""
    line = of_run(ctx) | {"who": who, "pid": os.getpid(), "at": time.time()} | fields
    journal = os.open(ctx.params["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, (json.dumps(line) + "\n").encode())
    os.close(journal)


async def go(ctx: Context[Any, Any]) -> None:
    """Save and write down one step after another, from where the last attempt was."""
    first = (ctx.checkpoint or {"step": 0})["step"]
    write(ctx, "start", first=first)
    for step in range(first + 1, ctx.params["steps"] + 1):
        if step == 3:
            await file_of(ctx, "third")
        write(ctx, "saving", step=step)
        await ctx.save({"step": step})
        write(ctx, "saved", step=step)
        await asyncio.sleep(ctx.params.get("pause", 0.1))


async def file_of(ctx: Context[Any, Any], name: str) -> None:
    """Wait for the file that a parameter names, if it is given."""
    path = ctx.params.get(name)
    while path is not None and not Path(path).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@job("fault.steps")
async def steps(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Take `params["steps"]` steps; wait for the files `third` before the third, and `until` at the end."""
    await go(ctx)
    await file_of(ctx, "until")
    write(ctx, "end")
    return {"steps": ctx.params["steps"]}


@job("fault.effects")
async def effects(ctx: Context[Any, Any]) -> None:
    """Write every 50 ms, without a word to the worker, beside a process of its own that does the same."""
    beside = subprocess.Popen([sys.executable, "-c", BESIDE, ctx.params["journal"], json.dumps(of_run(ctx))])
    write(ctx, "start", first=0)
    try:
        while not Path(ctx.params["until"]).exists():
            write(ctx, "effect")
            await asyncio.sleep(0.05)
    finally:
        beside.kill()
        beside.wait()
    write(ctx, "end")


@job("fault.acts")
async def acts(ctx: Context[Any, Any]) -> None:
    """Write every 50 ms for `params["seconds"]`, without a word to the worker."""
    write(ctx, "start", first=0)
    for _ in range(20 * ctx.params["seconds"]):
        write(ctx, "effect")
        await asyncio.sleep(0.05)
    write(ctx, "end")


@job("fault.polite")
async def polite(ctx: Context[Any, Any]) -> Any:
    """Save step by step, and hand the run back as soon as it is asked to end."""
    step = (ctx.checkpoint or {"step": 0})["step"]
    write(ctx, "start", first=step)
    while step < ctx.params["steps"]:
        if ctx.cancelled.is_set():
            write(ctx, "handed_back", reason=ctx.cancelled.reason)
            return HandBack()
        step += 1
        write(ctx, "saving", step=step)
        await ctx.save({"step": step})
        write(ctx, "saved", step=step)
        await asyncio.sleep(ctx.params.get("pause", 0.1))
    write(ctx, "end")
    return {"steps": step}


@job("fault.deaf")
async def deaf(ctx: Context[Any, Any]) -> dict[str, Any]:
    """The same, but swallow every cancellation and go on."""
    step = (ctx.checkpoint or {"step": 0})["step"]
    write(ctx, "start", first=step)
    while step < ctx.params["steps"]:
        try:
            step += 1
            write(ctx, "saving", step=step)
            await ctx.save({"step": step})
            write(ctx, "saved", step=step)
            await asyncio.sleep(ctx.params.get("pause", 0.1))
        except asyncio.CancelledError:
            write(ctx, "swallowed")
    write(ctx, "end")
    return {"steps": step}


@job("fault.spin")
def spin(ctx: BlockingContext[Any, Any]) -> None:
    """Never come back to anything that could interrupt it."""
    write(ctx, "start", first=0)
    while True:
        try:
            while True:
                pass
        except BaseException:
            write(ctx, "swallowed")


@job("fault.spin_async")
async def spin_async(ctx: Context[Any, Any]) -> None:
    """Hold the loop."""
    write(ctx, "start", first=0)
    while True:
        pass


@job("fault.sleep_in_c")
def sleep_in_c(ctx: BlockingContext[Any, Any]) -> None:
    """Sleep in C with the GIL held, again after each signal."""
    write(ctx, "start", first=0)
    sleep = ctypes.PyDLL(None).sleep
    while True:
        try:
            sleep(3600)
        except BaseException:
            write(ctx, "swallowed")


@job("fault.note")
async def note(ctx: Context[Any, Any]) -> None:
    """Write one line."""
    write(ctx, "note")


@job("fault.leak", max_attempts=1)
async def leak(ctx: Context[Any, Any]) -> None:
    """Print the token and parts of it, in every way that a careless or hostile handler might."""
    text = (await ctx.token()).reveal()
    for form in forms(text):
        print("printed", form)
        print(form, file=sys.stderr)
        ctx.log.error("logged %s", form)
    middle = len(text) // 2
    for stream in (sys.stdout, sys.stderr):
        for piece in (text[:middle], text[middle:], "\n"):  # split over two writes, with time in between
            stream.write(piece)
            stream.flush()
            await asyncio.sleep(0.1)
    os.write(1, text.encode() * 2)
    ctx.progress(1, note=f"noted {text}"[:500])
    await ctx.save({"saved": forms(text), text: 1})
    write(ctx, "leaked")
    raise RuntimeError(f"raised {' '.join(forms(text))}")


def forms(text: str) -> list[str]:
    """A token as others might write it, and parts of it."""
    header, payload, signature = text.split(".")
    shifted = [base64.b64encode(b"x" * shift + text.encode()).decode() for shift in range(3)]
    return [
        text,
        urllib.parse.quote(text),
        json.dumps({"token": text}),
        *shifted,
        *(base64.urlsafe_b64encode(form.encode()).decode() for form in (f"Bearer {text}", signature)),
        signature,
        f"{payload}.{signature}",
        f"{header}.{payload}",
        text[: len(text) // 2],
        text[len(text) // 2 :],
        signature[:40],
        signature[-40:],
    ]


@job("fault.paid")
async def paid(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Ask the chat server of `params["chat"]` in 50 steps, the last 10 of them four at a time."""

    async def ask(number: int) -> dict[str, Any]:
        question = {"run": ctx.run.id, "number": number, "attempt": ctx.run.attempt}
        response = await ctx.http.post(ctx.params["chat"], json=question)
        answer: dict[str, Any] = response.raise_for_status().json()
        await ctx.spend("llm_tokens", answer["tokens"])
        return answer

    write(ctx, "start", first=0)
    answers = []
    for number in range(1, 41):
        answers.append(await ctx.step("ask", ask, number))
        write(ctx, "answered", number=number, answer=answers[-1]["id"])
    answers += await ctx.map("more", ask, range(41, 51), concurrency=4)
    write(ctx, "end")
    return {"answers": [answer["id"] for answer in answers]}


# Leaves of all trees that may run at the same time.
LEAVES = 4


@job("fault.leaf", max_concurrent=LEAVES)
async def leaf(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Act for a moment; return the name it was given, and the org that it acts for."""
    write(ctx, "begin")
    await asyncio.sleep(0.15)
    write(ctx, "end")
    return {"name": ctx.params["name"], "org": ctx.org.code}


def named(ctx: Context[Any, Any], name: str) -> dict[str, Any]:
    return {"journal": ctx.params["journal"], "name": f"{ctx.params.get('name', ctx.run.id)}/{name}"}


@job("fault.node", children={"fault.leaf"})
async def node(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Start `params["leaves"]` leaves in the way of `params["how"]`; return their results in order."""
    write(ctx, "begin")
    given = [named(ctx, f"leaf{number}") for number in range(ctx.params["leaves"])]
    if ctx.params["how"] == "map_runs":
        results = [one async for one in ctx.map_runs("fault.leaf", given, concurrency=3, key=_name)]
        return {"org": ctx.org.code, "leaves": results}
    started = []
    for params in given:
        started.append(ctx.start("fault.leaf", params, key=params["name"]))
        if len(started) % 2 == 0:
            await ctx.save({"started": len(started)})
            await asyncio.sleep(0.05)
    if ctx.params["how"] == "gather":
        return {"org": ctx.org.code, "leaves": [one async for one in ctx.gather(started)]}
    results = []
    async for one in ctx.as_ended(started):
        write(ctx, "took", key=one.child.key)
        results.append(one.result)
    return {"org": ctx.org.code, "leaves": sorted(results, key=_name)}


def _name(params: dict[str, Any]) -> str:
    name: str = params["name"]
    return name


@job("fault.tree", children={"fault.node", "fault.leaf"})
async def tree(ctx: Context[Any, Any]) -> dict[str, Any]:
    """A node of each way to wait, and a leaf of its own between them."""
    write(ctx, "begin")
    started = []
    for how in ("gather", "as_ended", "map_runs"):
        given = named(ctx, how) | {"how": how, "leaves": ctx.params["leaves"]}
        started.append(ctx.start("fault.node", given, key=how))
        started.append(ctx.start("fault.leaf", named(ctx, f"{how}-leaf"), key=how))
        await ctx.save({"started": how})
        await asyncio.sleep(0.1)
    return {"org": ctx.org.code, "children": [one async for one in ctx.gather(started)]}


@job("fault.deep", children={"fault.deep"})
async def deep(ctx: Context[Any, Any]) -> int:
    """Start one of itself `params["below"]` times below each other; return how deep that went."""
    if not ctx.params["below"]:
        return 0
    child = ctx.start("fault.deep", ctx.params | {"below": ctx.params["below"] - 1}, key="below")
    [depth] = [one async for one in ctx.gather([child])]
    return int(depth) + 1


@job("fault.idle", isolation="inline")
async def idle(ctx: Context[Any, Any]) -> None:
    """Run until it is cancelled."""
    await ctx.cancelled.wait()
    await asyncio.sleep(3600)


@job("fault.wide", children={"fault.idle"})
async def wide(ctx: Context[Any, Any]) -> None:
    """Wait for `params["children"]` runs that do not end."""
    children = [ctx.start("fault.idle", key=number) for number in range(ctx.params["children"])]
    async for _ in ctx.gather(children):
        pass
