"""The handlers of the acceptance tests, copied into their own distribution: import only `worker` here.

Each writes what it does to the file `params["journal"]`, as lines of JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import time
from typing import Any

from pydantic import BaseModel, Field

from worker import BlockingContext, Context, job

# A process of the run that outlives its parent unless it is killed.
GRANDCHILD = """
import json, os, sys, time
while True:
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"who": "grandchild", "pid": os.getpid(), "at": time.time()}) + "\\n")
    time.sleep(0.05)
"""


class Settings(BaseModel):
    """The properties of an org that `acme.configured` reads."""

    max_tokens: int = Field(1000, ge=1)


def write(ctx: Any, **fields: Any) -> None:
    line = {"run": ctx.run.id, "attempt": ctx.run.attempt, "pid": os.getpid(), "at": time.time()} | fields
    with open(ctx.params["journal"], "a") as file:
        file.write(json.dumps(line) + "\n")


@job("acme.note")
async def note(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Write one line, and return what the context says about the run."""
    write(ctx, who="note", org=ctx.org.code)
    return {"org": ctx.org.code, "scheduled_for": ctx.run.scheduled_for.isoformat()}


@job("acme.inline", isolation="inline")
async def inline(ctx: Context[Any, Any]) -> None:
    """Write one line from the worker's own process."""
    write(ctx, who="inline")


@job("acme.configured", settings=Settings, scopes={"read:kb"})
async def configured(ctx: Context[Any, Settings]) -> dict[str, Any]:
    """Write one line, and return what the token's properties and flags say."""
    write(ctx, who="configured")
    return {"max_tokens": ctx.settings.max_tokens, "flag": ctx.flag("agent-v2")}


@job("acme.steps")
async def steps(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Count to `params["steps"]` with a checkpoint each, while a subprocess writes."""
    first = (ctx.checkpoint or {"step": 0})["step"]
    write(ctx, who="start", first=first)
    beside = subprocess.Popen([sys.executable, "-c", GRANDCHILD, ctx.params["journal"]])
    try:
        for step in range(first + 1, ctx.params["steps"] + 1):
            await ctx.save({"step": step})
            write(ctx, who="step", step=step, fencing_token=ctx.run.fencing_token)
            ctx.progress(step, ctx.params["steps"])
            await asyncio.sleep(ctx.params.get("pause", 0.1))
    finally:
        beside.kill()
        beside.wait()
    return {"first": first, "attempt": ctx.run.attempt}


@job("acme.os_exit")
async def os_exit(ctx: Context[Any, Any]) -> None:
    os._exit(3)


@job("acme.segfault")
async def segfault(ctx: Context[Any, Any]) -> None:
    ctypes.string_at(0)


@job("acme.block")
def block(ctx: BlockingContext[Any, Any]) -> None:
    """Run for ever, but take no processor time from others."""
    write(ctx, who="block")
    while True:
        time.sleep(0.1)


@job("acme.stuck_inline", isolation="inline")
async def stuck_inline(ctx: Context[Any, Any]) -> None:
    """Hold up the worker's own loop for `params["seconds"]`."""
    time.sleep(ctx.params["seconds"])


@job("acme.fetch")
async def fetch(ctx: Context[Any, Any]) -> list[int]:
    """Get every URL of `params["urls"]`, and follow redirects."""
    answers = [await ctx.http.get(url, follow_redirects=True) for url in ctx.params["urls"]]
    return [answer.status_code for answer in answers]


@job("acme.traced")
async def traced(ctx: Context[Any, Any]) -> str | None:
    """Get the URL, and return the trace context of the environment."""
    await ctx.http.get(ctx.params["url"])
    return os.environ.get("TRACEPARENT")


@job("acme.traced_inline", isolation="inline")
async def traced_inline(ctx: Context[Any, Any]) -> None:
    """The same from the worker's own process."""
    await ctx.http.get(ctx.params["url"])


@job("acme.poll", scopes={"read:kb"})
async def poll(ctx: Context[Any, Any]) -> list[int]:
    """Get the URL repeatedly for `params["seconds"]`; the statuses that were not 200."""
    until = time.monotonic() + ctx.params["seconds"]
    bad = []
    while time.monotonic() < until:
        status = (await ctx.http.get(ctx.params["url"])).status_code
        if status != 200:
            bad.append(status)
        await asyncio.sleep(0.1)
    return bad


@job("acme.chatty", max_attempts=1)
def chatty(ctx: BlockingContext[Any, Any]) -> None:
    """Print `params["lines"]` lines, wait for the file `until`, log, and crash if `crash` is set."""
    for number in range(ctx.params["lines"]):
        print(f"line {number} {'.' * 80}")
    while "until" in ctx.params and not os.path.exists(ctx.params["until"]):
        time.sleep(0.05)
    ctx.log.warning("these are my last words")
    if ctx.params.get("crash"):
        ctypes.string_at(0)


@job("acme.wants_file", max_attempts=1)
async def wants_file(ctx: Context[Any, Any]) -> None:
    """Save the number of calls, then fail unless the file `params["file"]` exists."""
    write(ctx, who="wants_file", org=ctx.org.code, checkpoint=ctx.checkpoint, key=ctx.run.idempotency_key)
    await ctx.save({"calls": (ctx.checkpoint or {"calls": 0})["calls"] + 1})
    if not os.path.exists(ctx.params["file"]):
        raise RuntimeError(f"no file at try {ctx.run.attempt}")


@job("acme.leak", max_attempts=1)
async def leak(ctx: Context[Any, Any]) -> None:
    """Print, log and raise the token, as a careless handler might."""
    text = (await ctx.token()).reveal()
    write(ctx, who="leak")
    print("printed", text)
    ctx.log.error("logged %s", text)
    ctx.progress(1, note=f"noted {text}")
    raise RuntimeError(f"raised {text}")


@job("acme.leak_result")
async def leak_result(ctx: Context[Any, Any]) -> dict[str, str]:
    """Save and return the token."""
    text = (await ctx.token()).reveal()
    await ctx.save({"saved": text})
    return {"returned": text}


@job("acme.spender")
async def spender(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Make `steps` calls that spend 10 tokens each, of a `model`; each is a line of the journal."""
    named = {"model": ctx.params["model"], "kind": "input"} if "model" in ctx.params else {}

    async def call(number: int) -> int:
        write(ctx, who="call", number=number)
        await ctx.spend("llm_tokens", 10, **named)
        await asyncio.sleep(ctx.params.get("pause", 0))
        return number

    results = [await ctx.step("call", call, number) for number in range(ctx.params["steps"])]
    await ctx.spend("llm_tokens", 1, **named)
    budget = await ctx.budget("money" if named else "llm_tokens")
    return {"results": results, "used": budget.used, "left": budget.left}


@job("acme.approved")
async def approved(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Pay for a draft, wait for a person's word, and publish."""

    def pay(what: str) -> str:
        write(ctx, who="paid", what=what)
        return what

    draft = await ctx.step("draft", pay, "draft")
    await ctx.sleep(ctx.params.get("sleep", "0s"))
    answer = await ctx.wait_for("approval", timeout="1h", ask={"publish": draft})
    return {"answer": answer, "published": await ctx.step("publish", pay, "publish")}


@job("acme.approving_agent")
async def approving_agent(ctx: Context[Any, Any]) -> str:
    """Run an agent that calls one tool twice at once, which needs approval; each call is a line."""
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    from worker import durable

    def respond(messages: Any, info: Any) -> ModelResponse:
        write(ctx, who="request")
        if len(messages) == 1:
            return ModelResponse([ToolCallPart("send", {"text": text}) for text in ("one", "two")])
        return ModelResponse([TextPart(", ".join(str(part.content) for part in messages[-1].parts))])

    sender = Agent(FunctionModel(respond), name="sender")

    @sender.tool_plain(requires_approval=True)
    async def send(text: str) -> str:
        write(ctx, who="send", text=text)
        return f"sent {text}"

    return (await durable(sender, ctx).run("Send both.")).output


@job("acme.batched_agent")
async def batched_agent(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Run an agent that calls a tool at each turn but the last; each call is a line."""
    from pydantic_ai import Agent

    from worker import durable

    agent = Agent(_model_of(ctx.params["provider"], ctx.params["url"]), name="digest")

    @agent.tool_plain
    async def look_up(topic: str) -> str:
        write(ctx, who="tool", topic=topic, org=ctx.org.code)
        return f"about {topic}"

    result = await durable(agent, ctx).run(f"Report on {ctx.org.code}.")
    return {"output": result.output}


def _model_of(provider: str, url: str) -> Any:
    if provider == "anthropic":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        return AnthropicModel("claude-sonnet-4-5", provider=AnthropicProvider(base_url=url, api_key="sk-run"))
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    given = OpenAIProvider(base_url=f"{url}/v1", api_key="sk-run")
    return OpenAIResponsesModel("gpt-5-mini", provider=given)


@job("acme.completing")
async def completing(ctx: Context[Any, Any]) -> dict[str, Any]:
    """Send requests to a model, one after the other, without a library; each has the answers before it."""
    said = [f"of {ctx.org.code}"]
    for turn in range(ctx.params.get("turns", 1)):
        write(ctx, who="turn", turn=turn)
        response = await ctx.complete({"model": "gpt-5-mini", "input": " ".join(said)})
        said.append(response["output"][0]["content"][0]["text"])
    return {"said": said[1:]}


@job("acme.v1", isolation="inline")
async def v1(ctx: Context[Any, Any]) -> dict[str, Any]:
    return {"version": 1}


@job("acme.v2", isolation="inline")
async def v2(ctx: Context[Any, Any]) -> dict[str, Any]:
    """As `acme.v1`, until the file `params["worse"]` exists."""
    if os.path.exists(ctx.params["worse"]):
        raise ValueError("the new prompt is worse")
    return {"version": 2}
