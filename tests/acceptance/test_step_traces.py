"""The spans of an agent's steps, as a collector on loopback receives them from workers and hosts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.collector import Collector, ReceivedSpan
from tests.fakes.hosts import opened_hosts
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

pytestmark = [pytest.mark.feature("org_secrets"), pytest.mark.timeout(240)]
TEXT = "canary-text-of-acme"
KEY = "sk-canary-of-acme-0123456789"
CLIENT, INTERNAL = 3, 1
SOURCE = """
from pydantic_ai import Agent
from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.usage import RequestUsage
from worker import Context, Retry, durable, job

async def act(ctx):
    said = f"{ctx.params['text']} {(await ctx.token()).reveal()} {ctx.secret('openai')}"

    def respond(messages, info):
        if len(messages) == 1:
            used = dict(cache_read_tokens=60, cache_write_tokens=5, output_reasoning_tokens=8)
            return ModelResponse(
                [ToolCallPart("look_up", {"what": said}, tool_call_id="call-1")],
                usage=RequestUsage(input_tokens=100, output_tokens=20, **used),
                provider_name="bedrock", provider_response_id="resp-1",
                finish_reason="tool_call",
            )
        return ModelResponse(
            [TextPart(said)], usage=RequestUsage(input_tokens=130, output_tokens=10), finish_reason="stop"
        )

    model = FunctionModel(respond, model_name="canary-1", settings={"max_tokens": 500})
    agent = Agent(model, name="support", instructions=said)

    @agent.tool_plain
    def look_up(what: str) -> str:
        return f"found {what}"

    async def fail():
        raise LookupError(said)

    await ctx.step("prepare", lambda: said, key=f"for {ctx.params['text']}")
    await durable(agent, ctx).run(said)
    if ctx.run.attempt == 1:
        try:
            await ctx.step("flaky", fail)
        except LookupError:
            return Retry("0s", "again")

@job("acme.agent", secrets={"openai"})
async def agent(ctx: Context):
    return await act(ctx)

@job("acme.sealed_agent", secrets={"openai"}, egress=["api"])
async def sealed_agent(ctx: Context):
    return await act(ctx)

@job("acme.inline_agent", secrets={"openai"}, isolation="inline")
async def inline_agent(ctx: Context):
    return await act(ctx)
"""
HANDLERS = ("agent", "sealed_agent", "inline_agent")


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.stop()


def prepared(site: Site, plugins: Path) -> Path:
    """The handlers in a folder, and an org with a secret."""
    site.environment["OTEL_BSP_SCHEDULE_DELAY"] = "200"
    points = {f"acme.{name}": f"acme_agents:{name}" for name in HANDLERS}
    site.add_orgs(application("org_acme"))
    site.cli("secrets", "add", "org_acme", "openai", stdin=f"{KEY}\n")
    return make_plugin(plugins, dist="acme-agents", modules={"acme_agents": SOURCE}, entry_points=points)


def traced(site: Site, collector: Collector, handler: str, **given: Any) -> tuple[str, list[ReceivedSpan]]:
    """The id of a run of a handler, and its spans, once those of both attempts have arrived."""
    given |= {"params": {"text": TEXT}, "api_origins": ["https://api.test"]}
    site.apply(definition("org_acme", "agent", handler, **given))
    run = site.cli("definitions", "run", "org_acme", "agent", "-o", "id").out.strip()
    ended = site.wait_for_end(definition="agent", timeout=90)
    assert ended["state"] == "succeeded", ended

    def arrived() -> list[ReceivedSpan] | None:
        spans = [span for span in collector.spans() if span.name != "token"]
        roots = [span for span in spans if span.name.startswith("RUN ")]
        return spans if len(roots) == 2 and any(span.name == "flaky" for span in spans) else None

    return run, wait_until(arrived, "the spans of both attempts")


def leaked(collector: Collector, *canaries: str) -> list[str]:
    sent = b"".join(collector.bodies)
    return [canary for canary in canaries if canary.encode() in sent]


def check_tree(run: str, spans: list[ReceivedSpan]) -> None:
    first, second = sorted(
        (span for span in spans if span.name.startswith("RUN ")), key=lambda one: one.start
    )
    handler = next(span for span in spans if span.name == "handler" and span.parent == first.id)
    below = sorted((span for span in spans if span.parent == handler.id), key=lambda one: one.start)
    assert [span.name for span in below] == [
        *("prepare", "chat canary-1", "execute_tool look_up", "chat canary-1", "flaky")
    ]
    assert len({span.trace for span in spans}) == 1
    _, asked, tool, answered, flaky = below
    assert [span.kind for span in below] == [INTERNAL, CLIENT, INTERNAL, CLIENT, INTERNAL]
    assert [span.failed for span in below] == [False, False, False, False, True]
    assert all(first.start <= span.start <= span.end <= first.end for span in below)
    for span in below:
        assert span.attributes["cicd.pipeline.run.id"] == run
        assert span.attributes["orgworker.org"] == "org_acme"
        assert span.attributes["orgworker.definition"] == "agent"
        assert span.attributes["orgworker.step.occurrence"] == "1"
    assert [span.attributes["orgworker.step"] for span in below] == [
        *("prepare", "model:support", "tool:look_up", "model:support", "flaky")
    ]
    assert flaky.attributes["error.type"] == "LookupError"
    assert gen_ai(asked) == {
        "operation.name": "chat",
        "provider.name": "aws.bedrock",
        "agent.name": "support",
        "request.model": "canary-1",
        "request.max_tokens": "500",
        "response.model": "canary-1",
        "response.id": "resp-1",
        "response.finish_reasons": ["tool_call"],
        "usage.input_tokens": "100",
        "usage.cache_read.input_tokens": "60",
        "usage.cache_creation.input_tokens": "5",
        "usage.output_tokens": "20",
        "usage.reasoning.output_tokens": "8",
    }
    assert gen_ai(tool) == {
        "operation.name": "execute_tool",
        "agent.name": "support",
        "tool.name": "look_up",
        "tool.type": "function",
        "tool.call.id": "call-1",
    }
    assert gen_ai(answered)["response.finish_reasons"] == ["stop"]
    # What the second attempt got without a call, it has as events.
    replayed = [told["orgworker.step"] for name, told in second.events if name == "orgworker.step.replayed"]
    assert replayed == ["prepare", "model:support", "tool:look_up", "model:support"]
    second_handler = next(span for span in spans if span.name == "handler" and span.parent == second.id)
    assert [span.name for span in spans if span.parent == second_handler.id] == []


def gen_ai(span: ReceivedSpan) -> dict[str, Any]:
    """What a span says of model or tool, without texts."""
    found = {
        name.removeprefix("gen_ai."): value
        for name, value in span.attributes.items()
        if name.startswith("gen_ai.") and name not in TEXTS
    }
    reasons = found.get("response.finish_reasons")
    if reasons is not None:
        found["response.finish_reasons"] = [each["stringValue"] for each in reasons["values"]]
    return found


TEXTS = {
    *("gen_ai.system_instructions", "gen_ai.input.messages", "gen_ai.output.messages"),
    *("gen_ai.tool.call.arguments", "gen_ai.tool.call.result"),
}


def tracing_of(collector: Collector, *, content: bool) -> str:
    telemetry = "\n[telemetry]\nrecord_content = true" if content else ""
    return f'[tracing]\nenabled = true\nendpoint = "{collector.endpoint}"{telemetry}'


@pytest.mark.parametrize("handler", [f"acme.{name}" for name in HANDLERS])
def test_steps_of_an_agent_are_spans_below_that_of_its_attempt(site, collector, provider, handler):
    prepared(site, site.plugins)
    site.configure(execution='inline = ["acme-agents"]', extra=tracing_of(collector, content=False))
    worker = site.start_worker()
    site.wait_for_handlers(handler)

    run, spans = traced(site, collector, handler)

    check_tree(run, spans)
    assert site.stop_worker(worker) == 0
    assert not any(TEXTS & span.attributes.keys() for span in spans)
    tokens = [form for token in provider.issued for form in (token, token.rpartition(".")[2])]
    assert tokens
    assert leaked(collector, TEXT, KEY, *tokens) == []


@pytest.mark.parametrize("handler", [f"acme.{name}" for name in HANDLERS[:2]])
def test_texts_are_recorded_if_they_are_asked_for_and_have_no_secret(site, collector, provider, handler):
    prepared(site, site.plugins)
    site.configure(extra=tracing_of(collector, content=True))
    worker = site.start_worker()
    site.wait_for_handlers(handler)

    run, spans = traced(site, collector, handler)

    check_tree(run, spans)
    assert site.stop_worker(worker) == 0
    asked, answered = sorted(
        (span for span in spans if span.name == "chat canary-1"), key=lambda one: one.start
    )
    tool = next(span for span in spans if span.name == "execute_tool look_up")
    prompt = json.loads(asked.attributes["gen_ai.input.messages"])
    assert [message["role"] for message in prompt] == ["user"]
    assert TEXT in prompt[0]["parts"][0]["content"]
    roles = [message["role"] for message in json.loads(answered.attributes["gen_ai.input.messages"])]
    assert roles == ["user", "assistant", "tool"]
    assert TEXT in asked.attributes["gen_ai.system_instructions"]
    assert TEXT in json.loads(answered.attributes["gen_ai.output.messages"])[0]["parts"][0]["content"]
    assert TEXT in json.loads(tool.attributes["gen_ai.tool.call.arguments"])["what"]
    assert TEXT in json.loads(tool.attributes["gen_ai.tool.call.result"])
    tokens = [form for token in provider.issued for form in (token, token.rpartition(".")[2])]
    assert leaked(collector, TEXT) == [TEXT]
    assert leaked(collector, KEY, *tokens) == []


@pytest.mark.feature("hosts")
@pytest.mark.parametrize("traced_by", ["the worker", "the host"])
def test_a_host_has_its_spans_made_by_its_worker_or_by_itself(site_on_either, collector, tmp_path, traced_by):
    site, port = site_on_either, free_port()
    with ExitStack() as stack:
        hosts = stack.enter_context(opened_hosts(site, port))
        plugins = prepared(site, tmp_path / "plugins-of-the-host")
        tracing = tracing_of(collector, content=True)
        extra = f'[attempts]\nlisten = "127.0.0.1:{port}"\n'
        by_worker = traced_by == "the worker"
        site.configure(
            execution="max_children = 0\nmax_inline = 0", extra=extra + (tracing if by_worker else "")
        )
        site.start_worker()
        hosts.prepare("h1", extra="" if by_worker else tracing)
        path = os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])
        hosts.launch("h1", environment={"PYTHONPATH": path})
        site.wait_for_handlers("acme.agent")
        # It wants a secret.
        [wanted] = [
            each
            for each in site.cli("pools", "approvals", "default", "-o", "json").json()
            if each["handler"] == "acme.agent"
        ]
        site.cli("pools", "approve", "default", "acme.agent", wanted["digest"])

        run, spans = traced(site, collector, "acme.agent", pool="default")

        check_tree(run, spans)
        assert leaked(collector, TEXT, KEY) == [TEXT]
