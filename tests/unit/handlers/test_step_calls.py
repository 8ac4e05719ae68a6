"""`ctx.step` and `ctx.map`: called once, replayed after that, whatever the function is."""

from __future__ import annotations

import asyncio
import json
import threading
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from tests.fakes.answering import AnsweringWorker, page
from tests.fakes.clock import ManualClock, settle
from tests.unit.handlers.test_context import given
from worker import PermanentError
from worker.errors import LeaseLost
from worker.handlers import step_calls
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calls import LoadSteps, StoreStep
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation
from worker.handlers.steps import RESULT_LIMIT, StepError, open_step
from worker.model.runs.run import NewStep, StepPage


class Stored:
    """The worker's side: keeps steps over attempts, masks the word hidden, and may hold a write back."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.steps: list[NewStep] = []
        self.pages = 0
        self.gate: asyncio.Event | None = None

    def load(self, after: int) -> StepPage:
        self.pages += 1
        return page(self.steps, after)

    def store(self, step: NewStep) -> str:
        self.steps.append(replace(step, result_json=step.result_json.replace("hidden", "[masked]")))
        return self.steps[-1].result_json

    def port(self, *, suspends: bool = False) -> AnsweringWorker:
        async def store(call: StoreStep) -> str:
            if self.gate is not None:
                await self.gate.wait()
            return self.store(call.step)

        answers = {LoadSteps: lambda call: self.load(call.after), StoreStep: store}
        return AnsweringWorker(answers, suspends)

    def context(self, *, replays: bool = True) -> Context[Any, Any]:
        return Context(self._given(replays), self.port(suspends=True), Cancellation())

    def blocking(self) -> BlockingContext[Any, Any]:
        return BlockingContext(self._given(True), self.port(), BlockingCancellation())

    def _given(self, replays: bool) -> Any:
        data = given(self.clock)
        data.replays = replays
        return data


class Calls:
    """Functions that count their calls."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    async def ask(self, prompt: Any, *, model: str = "small") -> Any:
        self.made.append(prompt)
        return {"answer": prompt, "model": model}

    def work(self, prompt: Any) -> Any:
        self.made.append((prompt, threading.current_thread() is threading.main_thread()))
        return {"answer": prompt}


@pytest.fixture
def stored(clock: ManualClock) -> Stored:
    return Stored(clock)


@pytest.fixture
def calls() -> Calls:
    return Calls()


async def test_a_step_is_called_once_and_replayed_after_that(stored: Stored, calls: Calls) -> None:
    async def handler(ctx: Context[Any, Any]) -> list[Any]:
        return [await ctx.step("ask", calls.ask, n, model="big") for n in range(5)]

    first = await handler(stored.context())
    assert calls.made == [0, 1, 2, 3, 4]
    assert await handler(stored.context()) == first == [{"answer": n, "model": "big"} for n in range(5)]

    assert calls.made == [0, 1, 2, 3, 4]
    assert [(step.name, step.occurrence, step.seq) for step in stored.steps] == [
        ("ask", n, n) for n in range(1, 6)
    ]
    # One page before the first call, and three for the five steps.
    assert stored.pages == 4


async def test_a_first_attempt_reads_no_page(stored: Stored, calls: Calls) -> None:
    await stored.context(replays=False).step("ask", calls.ask, 1)

    assert (stored.pages, len(stored.steps)) == (0, 1)


async def test_the_first_call_returns_what_is_stored(stored: Stored) -> None:
    class Answer(BaseModel):
        text: str
        n: int = 1

    async def ask() -> Any:
        return [Answer(text="hidden"), (1, 2)]

    first = await stored.context().step("ask", ask)

    assert first == [{"text": "[masked]", "n": 1}, [1, 2]]
    assert await stored.context().step("ask", ask) == first


async def test_the_occurrence_is_taken_when_step_is_called(stored: Stored, calls: Calls) -> None:
    ctx = stored.context()
    one, two = ctx.step("ask", calls.ask, "one"), ctx.step("ask", calls.ask, "two")
    await two
    await one

    assert [(step.occurrence, json.loads(step.result_json)["answer"]) for step in stored.steps] == [
        (2, "two"),
        (1, "one"),
    ]
    again = stored.context()
    assert (await again.step("ask", calls.ask, "other"))["answer"] == "one"


async def test_code_around_a_step_may_change(stored: Stored, calls: Calls) -> None:
    ctx = stored.context()
    await ctx.step("a", calls.ask, 1)
    await ctx.step("b", calls.ask, 2)

    later = stored.context()
    await later.step("b", calls.ask, 2)
    await later.step("new", calls.ask, 3)
    await later.step("a", calls.ask, 1)

    assert calls.made == [1, 2, 3]


async def test_different_names_run_at_the_same_time_and_one_name_with_keys(
    stored: Stored, calls: Calls
) -> None:
    async def handler(ctx: Context[Any, Any]) -> Any:
        async def each(key: str) -> Any:
            return await ctx.step("ask", calls.ask, key, key=key)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each(key)) for key in "abc"]
            other = group.create_task(ctx.step("other", calls.ask, "o"))
        return [task.result()["answer"] for task in (*tasks, other)]

    assert await handler(stored.context()) == ["a", "b", "c", "o"]
    assert await handler(stored.context()) == ["a", "b", "c", "o"]
    assert sorted(calls.made) == ["a", "b", "c", "o"]


async def test_one_name_from_two_tasks_without_a_key_is_an_error(stored: Stored, calls: Calls) -> None:
    ctx = stored.context()

    async def each() -> None:
        await ctx.step("ask", calls.ask, 1)

    await asyncio.create_task(each())
    with pytest.raises(StepError, match="step ask is used by two tasks: pass key="):
        await asyncio.create_task(each())


async def test_a_function_that_blocks_runs_in_a_thread(stored: Stored, calls: Calls) -> None:
    where: ContextVar[str] = ContextVar("where")
    where.set("handler")

    def work() -> Any:
        step = open_step()
        return [where.get(), str(step and step.id), threading.current_thread() is threading.main_thread()]

    ctx = stored.context()

    assert await ctx.step("work", work) == ["handler", "work", False]
    assert await ctx.step("lambda", lambda: calls.ask("x")) == {"answer": "x", "model": "small"}
    with pytest.raises(RuntimeError, match="StopIteration"):
        await ctx.step("stops", lambda: next(iter(())))


async def test_a_timeout_needs_an_async_function(stored: Stored, calls: Calls) -> None:
    ctx = stored.context()

    with pytest.raises(TypeError, match="step work: timeout= works for async functions only"):
        ctx.step("work", calls.work, 1, timeout="30s")
    with pytest.raises(TypeError, match="step ask: pass a function and its arguments"):
        ctx.step("ask", "text")  # type: ignore[arg-type]
    coroutine = calls.ask(1)
    with pytest.raises(TypeError, match="not a coroutine"):
        ctx.step("ask", coroutine)  # type: ignore[arg-type]
    coroutine.close()
    with pytest.raises(TypeError, match="retries="):
        ctx.step("ask", calls.ask, 1, retries=-1)
    with pytest.raises(StepError, match="'a b' is not a name"):
        ctx.step("a b", calls.ask, 1)


async def test_a_call_that_takes_too_long_is_tried_again(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    async def slow() -> int:
        tries.append(1)
        if len(tries) < 3:
            await asyncio.Event().wait()
        return len(tries)

    ctx = stored.context()
    with pytest.raises(TimeoutError):
        await ctx.step("slow", slow, timeout=0.001)
    assert await ctx.step("slow", slow, timeout=0.001, retries=1, backoff=0) == 3
    assert [step.occurrence for step in stored.steps] == [2]


async def test_retries_wait_twice_as_long_each_time(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def ask() -> None:
        raise ConnectionError("no")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(ConnectionError):
        await stored.context(replays=False).step("ask", ask, retries=3, backoff="2s")

    assert [low <= seconds <= 2 * low for low, seconds in zip((1, 2, 4), slept, strict=True)] == [True] * 3
    assert stored.steps == []


@pytest.mark.parametrize("error", [StepError("no"), PermanentError("no"), LeaseLost("no")])
async def test_some_errors_are_not_tried_again(stored: Stored, error: Exception) -> None:
    tries: list[int] = []

    async def ask() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        await stored.context().step("ask", ask, retries=5, backoff=0)
    assert tries == [1]


async def test_a_step_that_raises_stores_nothing_and_keeps_its_number(stored: Stored, calls: Calls) -> None:
    async def fails() -> None:
        raise ValueError("no")

    ctx = stored.context()
    with pytest.raises(ValueError, match="no"):
        await ctx.step("ask", fails)
    await ctx.step("ask", calls.ask, "second")

    assert [step.occurrence for step in stored.steps] == [2]


async def test_a_result_that_cannot_be_stored_says_why(stored: Stored) -> None:
    async def large() -> str:
        return "x" * RESULT_LIMIT

    async def odd() -> object:
        return object()

    ctx = stored.context()
    with pytest.raises(StepError, match="the result of step large is 256.0 KiB of JSON; the maximum is 256"):
        await ctx.step("large", large)
    with pytest.raises(StepError, match="the result of step odd is not JSON: .*; return less"):
        await ctx.step("odd", odd)
    assert stored.steps == []


async def test_a_step_in_a_step_is_an_error(stored: Stored, calls: Calls) -> None:
    ctx = stored.context()

    async def outer() -> None:
        await ctx.step("inner", calls.ask, 1)

    async def outer_map() -> None:
        await ctx.map("inner", calls.ask, [1])

    for function in (outer, outer_map):
        with pytest.raises(StepError, match="inner is used inside step outer"):
            await ctx.step("outer", function)
    assert calls.made == []


async def test_a_cancelled_step_still_stores_the_result_of_its_call(stored: Stored, calls: Calls) -> None:
    stored.gate = asyncio.Event()
    ctx = stored.context()
    task = asyncio.create_task(ctx.step("ask", calls.ask, 1))
    await settle()
    assert calls.made == [1]

    task.cancel()
    await settle()
    assert not task.done()
    stored.gate.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(stored.steps) == 1


async def test_a_map_keeps_the_order_and_its_concurrency(stored: Stored) -> None:
    running, most = 0, 0

    async def summarize(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10 - item):
            await asyncio.sleep(0)
        running -= 1
        return item * 2

    ctx = stored.context()

    assert await ctx.map("summaries", summarize, range(10), concurrency=3) == [n * 2 for n in range(10)]
    assert most == 3
    assert await ctx.map("summaries", summarize, []) == []


async def test_a_map_without_keys_replays_equal_items_only(stored: Stored, calls: Calls) -> None:
    await stored.context().map("m", calls.ask, ["a", "b", "c"])

    results = await stored.context().map("m", calls.ask, ["a", "x", "c", "d"])

    assert [result["answer"] for result in results] == ["a", "x", "c", "d"]
    assert calls.made == ["a", "b", "c", "x", "d"]
    # Both results of the second place stay: the old list finds its own again.
    again = await stored.context().map("m", calls.ask, ["a", "b", "c", "d"])
    assert [result["answer"] for result in again] == ["a", "b", "c", "d"]
    assert calls.made == ["a", "b", "c", "x", "d"]


async def test_a_map_with_keys_finds_moved_items(stored: Stored, calls: Calls) -> None:
    def key(item: dict[str, int]) -> int:
        return item["id"]

    await stored.context().map("m", calls.ask, [{"id": 1}, {"id": 2}], key=key)

    moved = [{"id": 2, "new": 1}, {"id": 3}, {"id": 1}, {"id": 1}]
    results = await stored.context().map("m", calls.ask, moved, key=key)

    assert [result["answer"] for result in results] == [{"id": 2}, {"id": 3}, {"id": 1}, {"id": 1}]
    # A key that is used twice is another step.
    assert calls.made == [{"id": 1}, {"id": 2}, {"id": 3}, {"id": 1}]


async def test_an_error_of_a_map_lets_the_calls_in_flight_finish(stored: Stored) -> None:
    started: list[int] = []

    async def work(item: int) -> int:
        started.append(item)
        if item == 1:
            raise SystemExit(3)
        for _ in range(20):
            await asyncio.sleep(0)
        return item

    ctx = stored.context()
    with pytest.raises(SystemExit):
        await ctx.map("m", work, range(10), concurrency=3)

    assert started == [0, 1, 2]
    assert [step.result_json for step in stored.steps] == ["0", "2"]
    assert ctx._steps.journal.in_flight == 0


async def test_a_cancelled_map_starts_no_other_call(stored: Stored) -> None:
    started: list[int] = []

    async def work(item: int) -> int:
        started.append(item)
        await asyncio.Event().wait()
        return item

    ctx = stored.context()
    task = asyncio.create_task(ctx.map("m", work, range(10), concurrency=2))
    await settle()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()
    assert started == [0, 1]


def test_a_blocking_step_refuses_what_it_cannot_do(stored: Stored, calls: Calls) -> None:
    ctx = stored.blocking()

    with pytest.raises(TypeError, match="timeout= works for async functions only"):
        ctx.step("work", calls.work, 1, timeout=3)
    with pytest.raises(TypeError, match="the function is async; declare the handler as async def"):
        ctx.step("ask", calls.ask, 1)
    with pytest.raises(StepError, match="step inner is used inside step outer"):
        ctx.step("outer", lambda: ctx.step("inner", calls.work, 1))
    with pytest.raises(StepError, match="step inner is used inside step m"):
        ctx.map("m", lambda item: ctx.step("inner", calls.work, 1), [1, 2])


def test_a_blocking_step_is_tried_again(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(step_calls.time, "sleep", slept.append)
    errors = [ConnectionError("no"), ConnectionError("no")]

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert stored.blocking().step("work", work, retries=2) == "done"
    assert len(slept) == 2


def test_an_error_of_a_blocking_map_is_raised(stored: Stored) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    with pytest.raises(ValueError, match="two"):
        stored.blocking().map("m", work, range(5), concurrency=1)
    assert [step.result_json for step in stored.steps] == ["0", "1"]
