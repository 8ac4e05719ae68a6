"""What a run's process reports of its steps, and what a worker reads of that."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic_ai import Agent, ModelRetry
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RequestUsage

from tests.fakes.answering import AnsweringWorker, page
from tests.fakes.clock import START, ManualClock
from tests.unit.handlers.test_context import given
from worker import durable
from worker.handlers import agent_spans
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calls import LoadSteps, NotACall, StoreStep, TraceStep, message_of, read
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation
from worker.handlers.span_parts import ABOUT_LIMIT, TEXT_LIMIT, TEXTS_LIMIT, cut
from worker.model.runs.run import NewStep
from worker.telemetry import genai
from worker.telemetry.tracing import MAX_REPLAYED, MAX_STEPS, Detail, StepSpan

SPAN = StepSpan("fetch", None, 1, START, START)


@dataclass
class Telling(AnsweringWorker):
    """A worker that keeps what it is told, as it reads it."""

    spans: list[StepSpan] = field(default_factory=list)
    stored: list[NewStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = {
            StoreStep: lambda call: self.stored.append(call.step),
            LoadSteps: lambda call: page(self.stored, call.after),
        }

    def tell(self, notice: Any) -> None:
        # As over a socket.
        told = read(notice.path, json.loads(json.dumps(message_of(notice))))
        assert isinstance(told, TraceStep)
        self.spans.append(told.span)

    @property
    def seen(self) -> list[tuple[str, str | None, bool]]:
        return [(span.name, span.error, span.replayed) for span in self.spans]


class Site:
    """Attempts of one run."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.worker = Telling()

    def context(self, traces: Detail = "steps") -> Context[Any, Any]:
        return Context(self._given(traces), self.worker, Cancellation())

    def blocking(self) -> BlockingContext[Any, Any]:
        return BlockingContext(self._given("steps"), self.worker, BlockingCancellation())

    def _given(self, traces: Detail) -> Any:
        data = given(self.clock)
        data.replays, data.traces = True, traces
        return data


@pytest.fixture
def site(clock: ManualClock) -> Site:
    return Site(clock)


def lost() -> None:
    raise LookupError("canary")


async def test_steps_failures_and_stored_results_are_reported(site: Site) -> None:
    ctx = site.context()

    def slow() -> int:
        site.clock.advance(2)
        return 1

    await ctx.step("a", slow)
    with pytest.raises(LookupError):
        await ctx.step("b", lost)
    again = site.context()
    await again.step("a", slow)

    assert site.worker.seen == [("a", None, False), ("b", "LookupError", False), ("a", None, True)]
    first = site.worker.spans[0]
    assert (first.started_at, first.ended_at) == (START, START + timedelta(seconds=2))
    assert "canary" not in str(site.worker.spans)


async def test_a_step_that_is_cancelled_is_reported(site: Site) -> None:
    async def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await site.context().step("a", stopped)

    assert site.worker.seen == [("a", "KeyboardInterrupt", False)]


async def test_nothing_is_reported_unless_it_is_asked_for(site: Site) -> None:
    ctx = site.context("none")

    await ctx.step("a", lambda: 1)
    await site.context("none").step("a", lambda: 1)

    assert site.worker.spans == []


def test_a_blocking_handler_and_its_threads_report_too(site: Site) -> None:
    ctx = site.blocking()

    ctx.step("a", lambda: 1)
    ctx.map("b", lambda item: item, [1, 2, 3])

    assert sorted(span.name for span in site.worker.spans) == ["a", "b", "b", "b"]


async def test_an_attempt_reports_no_more_than_what_becomes_spans(site: Site) -> None:
    ctx = site.context()
    for number in range(MAX_STEPS + 5):
        await ctx.step("a", lambda: 1, key=number)
    again = site.context()
    for number in range(MAX_REPLAYED + 5):
        await again.step("a", lambda: 1, key=number)

    replayed = [span for span in site.worker.spans if span.replayed]
    assert (len(site.worker.spans), len(replayed)) == (MAX_STEPS + MAX_REPLAYED, MAX_REPLAYED)


def agent_of(*models: FunctionModel) -> Agent[None, str]:
    agent = Agent(FallbackModel(*models) if len(models) > 1 else models[0], name="support")

    @agent.tool_plain(retries=2)
    def look_up(what: str) -> str:
        if what == "nothing":
            raise ModelRetry("canary: look for something")
        return f"found {what}"

    return agent


def answering(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    usage = RequestUsage(input_tokens=100, output_tokens=9, cache_read_tokens=60, output_reasoning_tokens=4)
    if len(messages) < 5:
        what = "nothing" if len(messages) == 1 else "it"
        return ModelResponse(
            [ToolCallPart("look_up", {"what": what})], usage=usage, finish_reason="tool_call"
        )
    return ModelResponse([TextPart("canary of the answer")], usage=usage, finish_reason="stop")


async def test_an_agents_requests_and_tools_say_what_they_are_about(site: Site) -> None:
    await durable(agent_of(FunctionModel(answering, model_name="m")), site.context()).run("canary")

    assert site.worker.seen == [
        ("model:support", None, False),
        ("tool:look_up", "ModelRetry", False),
        ("model:support", None, False),
        ("tool:look_up", None, False),
        ("model:support", None, False),
    ]
    asked, tool = site.worker.spans[0].about, site.worker.spans[1].about
    assert asked[genai.FINISH_REASONS] == ("tool_call",)
    assert [asked[name] for name in (genai.INPUT_TOKENS, genai.CACHE_READ_TOKENS)] == [100, 60]
    assert [asked[name] for name in (genai.OUTPUT_TOKENS, genai.REASONING_TOKENS)] == [9, 4]
    assert genai.CACHE_WRITE_TOKENS not in asked
    assert (tool[genai.OPERATION], tool[genai.TOOL], tool[genai.AGENT]) == (
        *("execute_tool", "look_up"),
        "support",
    )
    assert "canary" not in str(site.worker.spans)


async def test_with_texts_they_have_what_was_said(site: Site) -> None:
    await durable(agent_of(FunctionModel(answering, model_name="m")), site.context("texts")).run("canary")

    *_, tool, last = site.worker.spans
    said = json.loads(last.texts[genai.INPUT])
    assert [message["role"] for message in said] == ["user", "assistant", "tool", "assistant", "tool"]
    assert json.loads(last.texts[genai.OUTPUT])[0]["parts"][0]["content"] == "canary of the answer"
    assert json.loads(tool.texts[genai.ARGUMENTS]) == {"what": "it"}
    assert json.loads(tool.texts[genai.RESULT]) == "found it"


async def test_of_a_long_conversation_the_newest_messages_are_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_spans, "_MESSAGES", 200)

    await durable(agent_of(FunctionModel(answering)), site.context("texts")).run("x" * 1000)

    last = site.worker.spans[-1].texts[genai.INPUT]
    assert len(last) <= 202
    assert [message["role"] for message in json.loads(last)] == ["tool"]


async def test_a_fallbacks_request_is_that_of_the_model_that_answered(site: Site) -> None:
    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse([TextPart("ok")], provider_name="google")

    agent = agent_of(FunctionModel(answer, model_name="first"), FunctionModel(answer, model_name="second"))
    await durable(agent, site.context()).run("hello")

    about = site.worker.spans[0].about
    assert (about[genai.PROVIDER], about[genai.RESPONSE_MODEL]) == ("gcp.gemini", "first")


async def test_what_a_model_reports_in_an_odd_form_fails_no_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        usage = RequestUsage(input_tokens=-5, output_tokens=3)
        return ModelResponse([TextPart("ok")], usage=usage, provider_response_id="r" * 1000)

    settings: Any = {"temperature": Decimal("0.5"), "max_tokens": 2**60, "top_p": float("nan")}
    agent = agent_of(FunctionModel(answer, settings=settings))
    await durable(agent, site.context(), meter=None).run("hello")

    def broken(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(agent_spans, "_provider", broken)
    await durable(agent, site.context(), meter=None, key="again").run("hello")

    about, without = site.worker.spans[0].about, site.worker.spans[1].about
    assert about[genai.OUTPUT_TOKENS] == 3
    assert len(about[genai.RESPONSE_ID]) == ABOUT_LIMIT
    assert not {genai.INPUT_TOKENS, genai.TEMPERATURE, genai.MAX_TOKENS, genai.TOP_P} & about.keys()
    assert genai.OPERATION not in without


# What a process sends is not trusted.


def told(**changes: Any) -> StepSpan:
    message = message_of(TraceStep(SPAN))["span"] | changes
    notice = read("trace", {"span": message})
    assert isinstance(notice, TraceStep)
    return notice.span


def test_only_known_attributes_and_texts_are_read() -> None:
    span = told(
        about={
            "gen_ai.system": "x",
            "secret": "y",
            genai.TOOL: "t",
            genai.INPUT_TOKENS: "many",
            genai.TOP_P: 1,
        },
        texts={"gen_ai.prompt": "x", genai.RESULT: "r\0"},
        name="n" * 1000,
        error="E" * 1000,
    )

    assert span.about == {genai.TOOL: "t", genai.TOP_P: 1}
    assert span.texts == {genai.RESULT: "r�"}
    assert (len(span.name), len(span.error or "")) == (200, ABOUT_LIMIT)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 5},
        {"occurrence": 0},
        {"started_at": "yesterday"},
        {"about": []},
        {"texts": [1]},
        {"texts": {genai.INPUT: 1}},
        {"texts": dict.fromkeys(genai.TEXTS, "x" * (TEXTS_LIMIT // 2))},
    ],
)
def test_what_our_own_code_does_not_send_is_no_call(changes: dict[str, Any]) -> None:
    with pytest.raises(NotACall):
        told(**changes)


def test_all_texts_of_a_span_are_masked() -> None:
    span = replace(
        SPAN,
        key="k",
        error="e",
        about={genai.TOOL: "t", genai.FINISH_REASONS: ("f",), genai.TOP_P: 1.0},
        texts={genai.RESULT: "r"},
    )
    call = TraceStep(span)

    assert sorted(call.row.texts(call)) == ["e", "f", "fetch", "k", "r", "t"]
    masked: TraceStep = call.row.masked(call, lambda text: "[masked]")
    assert list(masked.row.texts(masked)) == ["[masked]"] * 6
    assert masked.span.about[genai.TOP_P] == 1.0


def test_texts_are_cut_after_they_are_masked() -> None:
    assert len(cut(replace(SPAN, texts={genai.RESULT: "x" * 50_000})).texts[genai.RESULT]) == TEXT_LIMIT
