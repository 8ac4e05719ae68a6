"""`durable`: an agent's model requests and tool calls are made once, whatever happens to its attempts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryImage, ModelRetry, ToolReturn
from pydantic_ai.capabilities import ModelFallback
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import (
    AgentStreamEvent,
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import RunContext

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock
from worker import Context, StepError, durable, job
from worker.handlers.calls import StoreStep
from worker.handlers.spending import DONE, Spending
from worker.handlers.step_calls import StepCalls
from worker.handlers.steps import StepJournal
from worker.model.runs.run import NewStep
from worker.testing import Crash, Orgworker


class Killed(BaseException):
    """The process of an attempt is gone."""


class Store:
    """The stored steps of one run. The attempt that stores one more than `kill_after` is killed."""

    def __init__(self) -> None:
        self.steps: list[NewStep] = []
        self.kill_after: int | None = None
        self.answers: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    @property
    def names(self) -> Counter[str]:
        return Counter(step.name for step in self.steps)

    def store(self, call: StoreStep) -> None:
        if self.kill_after is not None:
            if self.kill_after == 0:
                raise Killed
            self.kill_after -= 1
        self.steps.append(call.step)

    def port(self) -> AnsweringWorker:
        return AnsweringWorker({StoreStep: self.store}, steps=self.steps)


class Attempt(Context[Any, Any]):
    """A context of which only the steps work; they are those of the run's earlier attempts."""

    def __init__(self, store: Store) -> None:
        self.run = SimpleNamespace(id="run-1")  # type: ignore[assignment]
        self.steps_of = StepCalls(StepJournal(replays=True), store.port(), ManualClock())

        self.store = store
        self._given = SimpleNamespace(batched=False)  # type: ignore[assignment]

    @property
    def _steps(self) -> StepCalls:  # type: ignore[override]
        return self.steps_of

    def spend(self, meter: str, amount: Any, /, **how: Any) -> Any:
        """Noted with the open step, as for a run with budgets."""
        return Spending(self.store.port(), None, None, 1, ManualClock()).spend(meter, amount, **how) or DONE  # type: ignore[arg-type]

    async def wait_for(self, name: str, /, *, ask: Any = None, **options: Any) -> Any:
        """The answer, by the beginning of the name; else the attempt parks."""
        self.store.asked[name] = ask
        tool = name.rpartition(":")[0]
        if tool not in self.store.answers:
            raise Killed
        return self.store.answers[tool]


@pytest.fixture
def store() -> Store:
    return Store()


class Called:
    """What was really called: model requests, and tools with their arguments."""

    def __init__(self) -> None:
        self.requests = 0
        self.tools: list[Any] = []


@pytest.fixture
def called() -> Called:
    return Called()


@pytest.fixture
def forecaster(called: Called) -> Agent[None, str]:
    """Asks for two cities and a number at once, for another number after that was rejected, then answers."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        called.requests += 1
        match len(messages):
            case 1:
                cities = [ToolCallPart("weather", {"city": city}) for city in ("Bonn", "Ulm")]
                return ModelResponse([*cities, ToolCallPart("pick", {"number": 1})])
            case 3:
                return ModelResponse([ToolCallPart("pick", {"number": 2})])
        parts = [part for message in messages for part in message.parts]
        return ModelResponse(
            [TextPart(str([part.content for part in parts if isinstance(part, ToolReturnPart)]))]
        )

    agent = Agent(FunctionModel(respond), name="forecaster")

    @agent.tool_plain
    async def weather(city: str) -> dict[str, Any]:
        called.tools.append(city)
        await asyncio.sleep(0)
        return {"city": city, "degrees": 3}

    @agent.tool_plain
    def pick(number: int) -> int:
        called.tools.append(number)
        if number == 1:
            raise ModelRetry("not 1")
        return number

    return agent


EXPECTED = "[{'city': 'Bonn', 'degrees': 3}, {'city': 'Ulm', 'degrees': 3}, 'not 1', 2]"


async def test_each_request_and_tool_call_is_a_step(store: Store, forecaster: Agent, called: Called):
    result = await durable(forecaster, Attempt(store)).run("Where is it warm?")

    assert result.output == EXPECTED
    assert store.names == {"model:forecaster": 3, "tool:weather": 2, "tool:pick": 2}
    assert result.usage.requests == called.requests == 3


@pytest.mark.parametrize("after", range(7))
async def test_a_killed_attempt_pays_only_for_what_was_in_flight(
    store: Store, forecaster: Agent, called: Called, after: int
):
    store.kill_after = after
    with pytest.raises(Killed):
        await durable(forecaster, Attempt(store)).run("Where is it warm?")
    store.kill_after = None
    made, stored = called.requests + len(called.tools), store.names.total()
    # The three tools of one response run at the same time.
    assert stored == after < made <= after + 3

    result = await durable(forecaster, Attempt(store)).run("Where is it warm?")

    assert result.output == EXPECTED
    assert called.requests + len(called.tools) == made + 7 - stored
    assert store.names.total() == 7


@pytest.mark.parametrize("after", range(1, 8))
def test_a_run_that_crashes_after_a_step_goes_on_behind_it(
    orgworker: Orgworker, forecaster: Agent, called: Called, after: int
):
    @job("acme.forecast")
    async def forecast(ctx: Context[dict[str, Any], Any]) -> str:
        return (await durable(forecaster, ctx).run("Where is it warm?")).output

    finished = orgworker.run(forecast, faults=[Crash(after_step=after)])

    assert [attempt.outcome for attempt in finished.attempts] == ["lost", "succeeded"]
    assert finished.result == EXPECTED
    # Besides what is stored, the other tools of the same response were in flight.
    assert 7 <= called.requests + len(called.tools) <= 9


async def test_the_tokens_of_each_response_are_spent_with_its_step(store: Store, forecaster: Agent):
    result = await durable(forecaster, Attempt(store)).run("Where is it warm?")
    await durable(forecaster, Attempt(store)).run("Where is it warm?")

    spends = [spend for step in store.steps for spend in step.spends]
    assert {meter for meter, _ in spends} == {"llm_tokens"}
    assert sum(amount for _, amount in spends) == result.usage.total_tokens
    assert {step.name for step in store.steps if step.spends} == {"model:forecaster"}


async def test_the_meter_can_be_another_or_none(store: Store):
    agent = Agent(TestModel(), name="helper")

    await durable(agent, Attempt(store), meter="support_tokens").run("x")
    await durable(agent, Attempt(other := Store()), meter=None).run("x")

    assert [meter for step in store.steps for meter, _ in step.spends] == ["support_tokens"]
    assert [step.spends for step in other.steps] == [()]
    with pytest.raises(StepError, match="meter: 'no name' is not a name"):
        durable(agent, Attempt(store), meter="no name")


async def test_a_finished_run_is_replayed_without_a_call(store: Store, forecaster: Agent, called: Called):
    first = await durable(forecaster, Attempt(store)).run("Where is it warm?")
    again = await durable(forecaster, Attempt(store)).run("Where is it warm?")

    assert (again.output, again.usage) == (first.output, first.usage)
    assert again.new_messages()[-1].run_id == first.new_messages()[-1].run_id
    assert called.requests == 3


async def test_runs_of_one_agent_that_follow_each_other_are_told_apart(store: Store, called: Called):
    def count(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        called.requests += 1
        return ModelResponse([TextPart(f"answer {called.requests}")])

    agent = Agent(FunctionModel(count), name="counter")

    async def attempt() -> list[str]:
        ctx = Attempt(store)
        return [(await durable(agent, ctx).run("again")).output for _ in range(3)]

    assert await attempt() == await attempt() == ["answer 1", "answer 2", "answer 3"]


async def test_runs_of_one_agent_at_once_need_keys(store: Store):
    agent = Agent(TestModel(), name="helper")
    ctx = Attempt(store)

    with pytest.raises(StepError, match="agent helper runs twice at once: give each run its own key"):
        await asyncio.gather(durable(agent, ctx).run("a"), durable(agent, ctx).run("b"))

    await asyncio.gather(*(durable(agent, ctx, key=key).run("a") for key in ("kb-1", "kb-2")))


@pytest.mark.parametrize(
    ("kind", "tools", "output"),
    [
        # One request of this model is one step: the first of its models is not asked again.
        ("model", ["second"], "first saw second"),
        # The capability makes a request for each model: only the one that failed is sent again.
        ("capability", ["second", "first"], "first saw first"),
    ],
)
async def test_what_a_fallback_said_is_not_mixed_with_what_the_first_model_says_later(
    store: Store, called: Called, kind: str, tools: list[str], output: str
):
    down = True

    def first(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if down:
            raise ModelHTTPError(503, "first")
        # Some servers count the calls of each response from 0, so ids repeat.
        return respond(messages, "first")

    def second(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return respond(messages, "second")

    def respond(messages: list[ModelMessage], name: str) -> ModelResponse:
        if len(messages) == 1:
            return ModelResponse([ToolCallPart("note", {"name": name}, "call_0")])
        [result] = [part for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
        return ModelResponse([TextPart(f"{name} saw {result.content}")])

    one, other = FunctionModel(first), FunctionModel(second)
    if kind == "model":
        agent = Agent(FallbackModel(one, other), name="fallback")
    else:
        agent = Agent(one, name="fallback", capabilities=[ModelFallback(other)])

    @agent.tool_plain
    def note(name: str) -> str:
        called.tools.append(name)
        return name

    store.kill_after = 2
    with pytest.raises(Killed):
        await durable(agent, Attempt(store)).run("x")
    store.kill_after, down = None, False

    result = await durable(agent, Attempt(store)).run("x")

    assert (called.tools, result.output) == (tools, output)


IMAGE = BinaryImage(b"\x00png", media_type="image/png")


class Place(BaseModel):
    name: str


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("text", "text"),
        (Place(name="Bonn"), {"name": "Bonn"}),
        ([1, None, True], [1, None, True]),
        (None, None),
        (ToolReturn({"a": 1}, content="look", metadata={"b": 2}), {"a": 1}),
        (IMAGE, IMAGE),
    ],
    ids=["text", "model", "list", "none", "tool-return", "image"],
)
async def test_results_of_tools_come_back_as_stored(store: Store, returned: Any, shown: Any):
    agent = Agent(TestModel(), name="helper")

    @agent.tool_plain
    def give() -> Any:
        return returned

    for _ in range(2):
        result = await durable(agent, Attempt(store)).run("x")
        parts = [part for message in result.all_messages() for part in message.parts]
        [content] = [part.content for part in parts if isinstance(part, ToolReturnPart)]
        assert content == shown


async def test_an_error_of_a_tool_is_raised_and_nothing_stored(store: Store, called: Called):
    agent = Agent(TestModel(), name="helper")

    @agent.tool_plain
    def fail() -> str:
        called.tools.append("fail")
        if len(called.tools) == 1:
            raise ConnectionError("gone")
        return "back"

    with pytest.raises(ConnectionError):
        await durable(agent, Attempt(store)).run("x")
    await durable(agent, Attempt(store)).run("x")

    assert store.names == {"model:helper": 2, "tool:fail": 1}


async def test_a_tool_that_is_no_step_may_use_steps_itself(store: Store, called: Called):
    agent = Agent(TestModel(), name="helper", deps_type=Attempt)

    @agent.tool(metadata={"step": False})
    async def look_up(tool: RunContext[Attempt]) -> Any:
        called.tools.append("look_up")
        return await tool.deps.step("inside", lambda: "found", key=tool.tool_call_id)

    for _ in range(2):
        ctx = Attempt(store)
        await durable(agent, ctx).run("x", deps=ctx)

    assert called.tools == ["look_up"] * 2
    assert store.names == {"model:helper": 2, "inside": 1}


@pytest.mark.parametrize(
    ("answer", "sent", "told"),
    [
        (True, ["a"], "sent a"),
        ({"text": "better"}, ["better"], "sent better"),
        (False, [], "The tool call was denied."),
        ("too long", [], "too long"),
    ],
)
async def test_a_tool_that_needs_approval_is_called_once_it_was_approved(
    store: Store, called: Called, answer: Any, sent: list[str], told: str
):
    agent = Agent(TestModel(), name="helper")

    @agent.tool_plain(requires_approval=True)
    def send(text: str) -> str:
        called.tools.append(text)
        return f"sent {text}"

    with pytest.raises(Killed):
        await durable(agent, Attempt(store)).run("x")
    [ask] = store.asked.values()
    store.answers["approve:send"] = answer

    for _ in range(2):
        result = await durable(agent, Attempt(store)).run("x")

    assert ask == {"tool": "send", "arguments": {"text": "a"}}
    assert len(store.asked) == 1
    assert called.tools == sent
    assert told in result.output


async def test_an_approval_is_for_one_call_only():
    """A model that is asked again may want something else under the same call id."""

    async def asked_for(reply: str) -> set[str]:
        def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            return ModelResponse([ToolCallPart("send", {"text": reply}, "call_0")])

        agent = Agent(FunctionModel(respond), name="helper")

        @agent.tool_plain(requires_approval=True)
        def send(text: str) -> str:
            return text

        store = Store()
        with pytest.raises(Killed):
            await durable(agent, Attempt(store)).run("x")
        return set(store.asked)

    assert await asked_for("first") != await asked_for("second")


async def test_an_agent_inside_a_tool_is_refused(store: Store):
    agent = Agent(TestModel(), name="outer", deps_type=Attempt)

    @agent.tool
    async def ask(tool: RunContext[Attempt]) -> Any:
        return (await durable(Agent(TestModel(), name="inner"), tool.deps).run("x")).output

    ctx = Attempt(store)
    with pytest.raises(StepError, match=r"step model:inner is used inside step tool:ask"):
        await durable(agent, ctx).run("x", deps=ctx)


async def test_a_stream_is_delivered_from_the_stored_response(store: Store, called: Called):
    async def words(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        called.requests += 1
        yield "two "
        yield "words"

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        called.requests += 1
        return ModelResponse([TextPart("two words")])

    agent = Agent(FunctionModel(respond, stream_function=words), name="helper")
    seen = []

    async def watch(run: RunContext[None], events: Any) -> None:
        event: AgentStreamEvent
        async for event in events:
            seen.append(event.event_kind)

    async with durable(agent, Attempt(store)).run_stream("x") as stream:
        assert [text async for text in stream.stream_text()] == ["two words"]
    result = await durable(agent, Attempt(store)).run("x", event_stream_handler=watch)

    assert result.output == "two words"
    assert "part_start" in seen
    assert called.requests == 1


async def test_names_of_others_become_names_of_steps(store: Store):
    agent = Agent(TestModel(), name="Tool smith, v2 ☂")

    await durable(agent, Attempt(store), key="k" * 300).run("x")

    assert store.names == {"model:Tool-smith--v2--": 1}


async def test_an_agent_without_a_name_is_told_so(store: Store):
    with pytest.raises(StepError, match=r'the agent has no name.*Agent\(…, name="support"\)'):
        durable(Agent(TestModel()), Attempt(store))


async def test_a_handler_that_blocks_is_told_so():
    with pytest.raises(TypeError, match="needs the Context of an async handler"):
        durable(Agent(TestModel(), name="helper"), object())  # type: ignore[arg-type]
