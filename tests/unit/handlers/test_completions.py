"""`ctx.complete` and agents in batch mode: a request parks its run, and is sent on its own if it must be.

That is what docs/reference/batches.md says of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock
from tests.unit.handlers.test_context import given
from worker import durable, job
from worker.demo.model_apis import ModelApis
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calling import call, call_blocking
from worker.handlers.calls import NotACall, OpenWait, message_of, read
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation
from worker.model.batches import MAX_BODY, ModelApi, NewRequest
from worker.model.runs.outcome import Failed, Outcome, Parked, Succeeded
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait, WaitState

API = ModelApi("openai", "openai", "https://api.openai.com", "openai_key")
Handler = Callable[[Context[Any, Any]], Awaitable[Any]]
FAKE = ModelApis(now=time.time)


def answered(body: dict[str, Any], reply: Any) -> WaitState:
    """The state of a wait whose request got this reply in its batch."""
    response = FAKE._response(body, reply, openai=True)
    return WaitState("batch", "answered", json.dumps({"status": "succeeded", "body": json.dumps(response)}))


class Worker:
    """The worker's side over attempts: `answer` says how each request stands."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.requests: list[NewRequest] = []
        self.steps: list[NewStep] = []
        self.alone: list[httpx.Request] = []
        self.answer: Callable[[NewRequest], WaitState] = lambda request: WaitState("batch", "pending")
        self.batched = True

    def open(self, opened: OpenWait) -> WaitState:
        # As it travels from a run's process.
        read_again = read(opened.path, json.loads(json.dumps(message_of(opened))))
        assert isinstance(read_again, OpenWait) and read_again.wait.request is not None
        self.requests.append(read_again.wait.request)
        return self.answer(read_again.wait.request)

    def sent(self, request: httpx.Request) -> httpx.Response:
        self.alone.append(request)
        return httpx.Response(200, json=FAKE._response(json.loads(request.content), "alone", openai=True))

    def data(self) -> Any:
        secrets = {"openai_key": "sk-of-the-org"}
        return replace(
            given(self.clock), replays=True, batched=self.batched, model_apis=(API,), secrets=secrets
        )

    async def run(self, handler: Handler) -> Outcome:
        port = AnsweringWorker({OpenWait: self.open}, suspends=True, steps=self.steps)
        transports = {"http": httpx.MockTransport(self.sent)}
        ctx: Context[Any, Any] = Context(self.data(), port, Cancellation(), transports, lambda parked: None)

        @job("acme.batched")
        async def body(ctx: Context[Any, Any]) -> Any:
            return await handler(ctx)

        return await call(body, ctx)


@pytest.fixture
def worker(clock: ManualClock) -> Worker:
    return Worker(clock)


def text_of(response: dict[str, Any]) -> str:
    return str(response["output"][0]["content"][0]["text"])


async def completing(ctx: Context[Any, Any]) -> str:
    return text_of(await ctx.complete({"model": "gpt-5-mini", "input": "hello"}))


async def test_a_request_parks_and_its_result_becomes_the_step(worker: Worker) -> None:
    assert await worker.run(completing) == Parked("batch", "openai")
    [request] = worker.requests
    assert (request.step, request.api, request.path, request.meter) == (
        *("complete", "openai", "/v1/responses", "llm_tokens"),
    )
    assert json.loads(request.body_json) == {"model": "gpt-5-mini", "input": "hello"}

    worker.answer = lambda request: answered(json.loads(request.body_json), "in a batch")
    assert await worker.run(completing) == Succeeded('"in a batch"')
    assert [(step.name, step.spends) for step in worker.steps] == [("complete", ())]

    # A later attempt has the step.
    asked = len(worker.requests)
    assert await worker.run(completing) == Succeeded('"in a batch"')
    assert (len(worker.requests), worker.alone) == (asked, [])


async def test_a_request_that_falls_back_is_sent_by_the_run(worker: Worker) -> None:
    worker.answer = lambda request: WaitState("batch", "over")

    assert await worker.run(completing) == Succeeded('"alone"')

    [step] = worker.steps
    assert step.spends == (("llm_tokens", 120),)
    assert [(used.model, dict(used.kinds)) for used in step.used] == [
        ("gpt-5-mini", {"input": 100, "output": 20, "request": 1})
    ]
    [request] = worker.alone
    assert str(request.url) == "https://api.openai.com/v1/responses"
    assert request.headers["authorization"] == "Bearer sk-of-the-org"
    assert request.headers["idempotency-key"]
    assert [step.spends for step in worker.steps] == [(("llm_tokens", 120),)]


async def test_without_batches_a_request_is_sent_at_once(worker: Worker) -> None:
    worker.batched = False

    assert await worker.run(completing) == Succeeded('"alone"')
    assert worker.requests == [] and len(worker.steps) == 1


async def test_requests_at_the_same_time_wait_together(worker: Worker) -> None:
    import asyncio

    async def both(ctx: Context[Any, Any]) -> list[str]:
        asked = [ctx.complete({"model": "m", "input": text}, key=text) for text in ("a", "b")]
        return [text_of(response) for response in await asyncio.gather(*asked)]

    assert await worker.run(both) == Parked("batch", "openai")
    assert [request.key for request in worker.requests] == ["a", "b"]

    worker.answer = lambda request: answered(json.loads(request.body_json), request.key)
    assert await worker.run(both) == Succeeded('["a","b"]')


def test_a_handler_that_blocks_parks_as_well(worker: Worker) -> None:
    @job("acme.blocking")
    def body(ctx: BlockingContext[Any, Any]) -> Any:
        return text_of(ctx.complete({"model": "m", "input": "x"}))

    def run() -> Outcome:
        port = AnsweringWorker({OpenWait: worker.open}, steps=worker.steps)
        transports = {"http": httpx.MockTransport(worker.sent)}
        data, cancelled = worker.data(), BlockingCancellation()
        return call_blocking(body, BlockingContext(data, port, cancelled, transports, lambda parked: None))

    assert run() == Parked("batch", "openai")
    worker.answer = lambda request: WaitState("batch", "over")
    assert run() == Succeeded('"alone"')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text", "pass the body"),
        ({"input": "x"}, "pass the body"),
        ({"model": "m", "stream": True}, "stream"),
        ({"model": "m", "input": "x" * (MAX_BODY + 1)}, "send less"),
    ],
)
async def test_what_is_no_request_is_refused(worker: Worker, body: Any, message: str) -> None:
    outcome = await worker.run(lambda ctx: ctx.complete(body))

    assert isinstance(outcome, Failed) and message in outcome.error.message
    assert worker.requests == [] and worker.steps == []


async def test_a_name_that_is_not_configured_is_refused(worker: Worker) -> None:
    outcome = await worker.run(lambda ctx: ctx.complete({"model": "m"}, via="mine"))

    assert (
        isinstance(outcome, Failed) and "via= is the NAME of [batches.NAME]: openai" in outcome.error.message
    )


def test_only_a_wait_for_a_batch_has_a_request() -> None:
    request = NewRequest("complete", None, 1, "openai", "/v1/responses", "{}")
    for wait in (NewWait("a", 1, "answer", request=request), NewWait("a", 1, "batch")):
        with pytest.raises(NotACall, match="only a wait for a batch"):
            read("wait", json.loads(json.dumps(message_of(OpenWait(wait)))))


# --- Agents. ---


def agent() -> Agent[None, str]:
    provider = OpenAIProvider(base_url="https://api.openai.com/v1", api_key="sk-placeholder")
    made = Agent(OpenAIResponsesModel("gpt-5-mini", provider=provider), name="digest")

    @made.tool_plain
    def look_up(topic: str) -> str:
        return f"about {topic}"

    return made


async def reporting(ctx: Context[Any, Any]) -> str:
    return (await durable(agent(), ctx).run("Report.")).output


async def test_each_request_of_an_agent_waits_in_a_batch(worker: Worker) -> None:
    def answer(request: NewRequest) -> WaitState:
        body = json.loads(request.body_json)
        is_last = "function_call_output" in request.body_json
        return answered(body, "done" if is_last else ("look_up", {"topic": "x"}))

    assert await worker.run(reporting) == Parked("batch", "openai")
    [first] = worker.requests
    assert (first.step, first.path, json.loads(first.body_json)["model"]) == (
        *("model:digest", "/v1/responses", "gpt-5-mini"),
    )
    worker.answer = lambda request: (
        answer(request) if request.key == first.key else WaitState("batch", "pending")
    )
    assert await worker.run(reporting) == Parked("batch", "openai")
    assert "about x" in worker.requests[-1].body_json

    worker.answer = answer
    assert await worker.run(reporting) == Succeeded('"done"')
    assert [step.name for step in worker.steps] == ["model:digest", "tool:look_up", "model:digest"]
    # The worker counts their tokens.
    assert {step.spends for step in worker.steps} == {()}
    assert json.loads(worker.steps[0].result_json)["usage"]["input_tokens"] == 100


async def test_a_model_without_batches_is_asked_at_once(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> str:
        return (await durable(Agent(TestModel(), name="plain"), ctx).run("Hi")).output

    outcome = await worker.run(handler)

    assert isinstance(outcome, Succeeded) and worker.requests == []


async def test_settings_that_no_batch_takes_are_sent_at_once(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> str:
        provider = OpenAIProvider(
            base_url="https://api.openai.com/v1", api_key="sk-x", http_client=ctx.http_client("httpx2")
        )
        made = Agent(OpenAIResponsesModel("gpt-5-mini", provider=provider), name="digest")
        return (await durable(made, ctx).run("Hi", model_settings={"timeout": 5.0})).output

    assert await worker.run(handler) == Succeeded('"alone"')
    assert worker.requests == [] and len(worker.alone) == 1
