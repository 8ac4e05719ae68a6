"""`ctx.sleep` and `ctx.wait_for`: when an attempt parks, and that nothing of the handler swallows it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import StrEnum
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock, settle
from tests.unit.handlers.test_context import given
from worker import WaitTimeout, job
from worker.handlers import waits
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calling import call, call_blocking, outcome_of_error
from worker.handlers.calls import OpenWait
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation
from worker.handlers.steps import StepError
from worker.handlers.waits import Parking
from worker.model.runs.outcome import Failed, Outcome, Parked, Succeeded
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait, WaitState

Handler = Callable[[Context[Any, Any]], Awaitable[Any]]
BlockingHandler = Callable[[BlockingContext[Any, Any]], Any]


class Worker:
    """The worker's side: answers waits by name, keeps what was opened, and steps over attempts."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.opened: list[str] = []
        self.waits: list[NewWait] = []
        self.states: dict[str, WaitState] = {}
        self.steps: list[NewStep] = []
        self.parks: list[Parked] = []
        self.saved: list[str] = []

    def answer(self, name: str, text: str | None) -> None:
        self.states[name] = WaitState("answer", "answered", text)

    def open(self, wait: NewWait) -> WaitState:
        key = wait.name if wait.occurrence == 1 else f"{wait.name}#{wait.occurrence}"
        self.opened.append(key)
        self.waits.append(wait)
        return self.states.get(key, WaitState(wait.kind, "pending"))

    def port(self, *, suspends: bool = False) -> AnsweringWorker:
        answers = {OpenWait: lambda call: self.open(call.wait)}
        return AnsweringWorker(answers, suspends, self.saved.append, steps=self.steps)

    async def run(self, handler: Handler) -> Outcome:
        """One attempt of an async handler."""
        data = given(self.clock)
        data.replays = True
        ctx: Context[Any, Any] = Context(
            data, self.port(suspends=True), Cancellation(), None, self.parks.append
        )

        @job("acme.waits")
        async def body(ctx: Context[Any, Any]) -> Any:
            return await handler(ctx)

        return await call(body, ctx)

    def run_blocking(self, handler: BlockingHandler) -> Outcome:
        """One attempt of a handler that blocks."""
        data = given(self.clock)
        data.replays = True
        port = self.port()
        ctx: BlockingContext[Any, Any] = BlockingContext(
            data, port, BlockingCancellation(), None, self.parks.append
        )

        @job("acme.waits")
        def body(ctx: BlockingContext[Any, Any]) -> Any:
            return handler(ctx)

        return call_blocking(body, ctx)


@pytest.fixture
def worker(clock: ManualClock) -> Worker:
    return Worker(clock)


async def test_a_wait_parks_and_the_next_attempt_gets_the_answer(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> Any:
        return await ctx.wait_for("approval", timeout="3d", ask={"publish": "it"})

    assert await worker.run(handler) == Parked("answer", "approval")

    worker.answer("approval", '{"yes": true}')
    assert await worker.run(handler) == Succeeded('{"yes":true}')
    assert len(worker.parks) == 1


async def test_a_sleep_parks_until_it_is_over(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> str:
        await ctx.sleep("2d")
        return "awake"

    assert await worker.run(handler) == Parked("asleep")

    worker.states["sleep"] = WaitState("sleep", "over")
    assert await worker.run(handler) == Succeeded('"awake"')


async def test_a_wait_that_timed_out_raises_on_each_attempt(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> str:
        try:
            await ctx.wait_for("approval", timeout="1h")
        except WaitTimeout:
            return "nobody"
        return "somebody"

    worker.states["approval"] = WaitState("answer", "over")

    assert await worker.run(handler) == Succeeded('"nobody"')
    assert await worker.run(handler) == Succeeded('"nobody"')


async def test_a_timeout_that_the_handler_lets_pass_is_not_retried() -> None:
    outcome = outcome_of_error(WaitTimeout("approval was not answered in time"))

    assert isinstance(outcome, Failed) and outcome.permanent


async def except_exception(ctx: Context[Any, Any]) -> str:
    try:
        await ctx.wait_for("approval")
    except Exception:
        return "swallowed"
    return "answered"


async def except_cancelled(ctx: Context[Any, Any]) -> str:
    with suppress(asyncio.CancelledError):
        await ctx.wait_for("approval")
    return "swallowed"


async def except_everything_and_step(ctx: Context[Any, Any]) -> str:
    with suppress(BaseException):
        await ctx.wait_for("approval")
    await ctx.step("after", lambda: "called")
    return "swallowed"


async def in_a_group(ctx: Context[Any, Any]) -> str:
    with suppress(Exception):
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.wait_for("approval"))
            group.create_task(ctx.sleep("1h"))
    return "swallowed"


async def gathered(ctx: Context[Any, Any]) -> str:
    await asyncio.gather(ctx.wait_for("approval"), ctx.sleep("1h"), return_exceptions=True)
    return "swallowed"


async def waited(ctx: Context[Any, Any]) -> str:
    await asyncio.wait({asyncio.create_task(ctx.wait_for("approval"))})
    return "swallowed"


async def behind_a_future(ctx: Context[Any, Any]) -> str:
    """It looks like a request in flight: only patience tells."""
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(ctx.wait_for("approval"))
    asking.add_done_callback(lambda done: None if done.cancelled() else future.set_result("swallowed"))
    return await future


async def shielded(ctx: Context[Any, Any]) -> str:
    with suppress(asyncio.CancelledError):
        await asyncio.shield(asyncio.create_task(ctx.wait_for("approval")))
    return "swallowed"


async def behind_a_queue(ctx: Context[Any, Any]) -> str:
    queue: asyncio.Queue[str] = asyncio.Queue()

    async def ask() -> None:
        queue.put_nowait(await ctx.wait_for("approval"))

    asking = asyncio.create_task(ask())
    answer = await queue.get()
    await asking
    return answer


@pytest.mark.parametrize(
    "handler",
    [
        except_exception,
        except_cancelled,
        except_everything_and_step,
        in_a_group,
        gathered,
        waited,
        shielded,
        behind_a_queue,
        behind_a_future,
    ],
)
async def test_no_handler_swallows_a_park(
    worker: Worker, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "PATIENCE", 0.3)
    async with asyncio.timeout(5):
        outcome = await worker.run(handler)

    assert isinstance(outcome, Parked) and outcome.reason == "answer"
    assert worker.steps == []


async def test_the_finally_of_a_handler_runs_when_it_parks(worker: Worker) -> None:
    cleaned = []

    async def handler(ctx: Context[Any, Any]) -> None:
        try:
            await ctx.wait_for("approval")
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    assert isinstance(await worker.run(handler), Parked)
    assert cleaned == [True]


async def test_tasks_that_wait_at_once_park_together_and_go_on_at_the_first_event(worker: Worker) -> None:
    done = []

    async def one(ctx: Context[Any, Any], name: str) -> None:
        await ctx.wait_for(name)
        done.append(name)

    async def handler(ctx: Context[Any, Any]) -> int:
        async with asyncio.TaskGroup() as group:
            for name in ("a", "b", "c"):
                group.create_task(one(ctx, name))
        return len(done)

    assert await worker.run(handler) == Parked("answer", "a, b, c")
    assert worker.opened == ["a", "b", "c"]

    worker.answer("b", "1")
    assert await worker.run(handler) == Parked("answer", "a, c")
    assert done == ["b"]


async def test_an_attempt_parks_only_when_no_step_is_in_flight(worker: Worker) -> None:
    gate, calls = asyncio.Event(), []

    async def pay() -> str:
        calls.append("paid")
        await gate.wait()
        return "receipt"

    async def handler(ctx: Context[Any, Any]) -> None:
        await asyncio.gather(ctx.wait_for("approval"), ctx.step("pay", pay))

    running = asyncio.create_task(worker.run(handler))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not running.done() and worker.opened == ["approval"]
    gate.set()

    assert isinstance(await running, Parked)
    assert [step.result_json for step in worker.steps] == ['"receipt"']


async def test_steps_that_follow_each_other_end_before_the_park(worker: Worker) -> None:
    async def chain(ctx: Context[Any, Any]) -> None:
        for number in range(5):
            await ctx.step("link", lambda number=number: number)

    async def handler(ctx: Context[Any, Any]) -> None:
        await asyncio.gather(ctx.wait_for("approval"), chain(ctx))

    assert isinstance(await worker.run(handler), Parked)
    assert len(worker.steps) == 5


async def test_a_handler_that_goes_on_without_a_wait_is_not_parked(worker: Worker) -> None:
    """The first of two waits is over, and the handler uses no other: parking it would never end."""
    worker.answer("first", '"yes"')
    response = asyncio.get_running_loop().create_future()

    async def handler(ctx: Context[Any, Any]) -> Any:
        waits = {asyncio.create_task(ctx.wait_for(name)) for name in ("first", "second")}
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await response
        return done.pop().result()

    running = asyncio.ensure_future(worker.run(handler))
    await settle(200)
    assert not running.done()
    response.set_result(None)

    assert await running == Succeeded('"yes"')


async def test_a_cancelled_wait_does_not_park(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> str:
        waiting = asyncio.create_task(ctx.wait_for("approval"))
        await asyncio.sleep(0)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        for _ in range(50):
            await asyncio.sleep(0)
        return "went on"

    assert await worker.run(handler) == Succeeded('"went on"')


async def test_occurrences_are_taken_when_called(worker: Worker) -> None:
    worker.answer("approval", "1")
    worker.answer("approval#2", "2")

    async def handler(ctx: Context[Any, Any]) -> list[Any]:
        first, second = ctx.wait_for("approval"), ctx.wait_for("approval")
        return [await second, await first]

    assert await worker.run(handler) == Succeeded("[2,1]")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda ctx: ctx.wait_for("no name"), "is not a name"),
        (lambda ctx: ctx.wait_for("sleep"), "is reserved"),
        (lambda ctx: ctx.wait_for("budget:tokens"), "is reserved"),
        (lambda ctx: ctx.wait_for("approval", ask="x" * 20_000), "the maximum is 16 KiB"),
        (lambda ctx: ctx.wait_for("approval", ask=object()), "is not JSON"),
        (lambda ctx: ctx.sleep("1h", name=""), "is not a name"),
        (lambda ctx: ctx.step("outer", lambda: ctx.wait_for("approval")), "inside step outer"),
        (lambda ctx: ctx.step("outer", lambda: ctx.sleep("1h")), "sleep is used inside step outer"),
    ],
    ids=["name", "sleep", "budget", "large", "not JSON", "name of a sleep", "in a step", "asleep in a step"],
)
async def test_wrong_use_is_a_clear_error(worker: Worker, use: Handler, message: str) -> None:
    async def handler(ctx: Context[Any, Any]) -> Any:
        with pytest.raises(StepError, match=message):
            await use(ctx)
        return "refused"

    assert await worker.run(handler) == Succeeded('"refused"')


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (WaitState("answer", "too_many"), "10,000 waits"),
        (WaitState("sleep", "over"), "used this name for a sleep"),
    ],
)
async def test_what_the_worker_refuses_is_a_clear_error(
    worker: Worker, state: WaitState, message: str
) -> None:
    worker.states["approval"] = state

    async def handler(ctx: Context[Any, Any]) -> None:
        with pytest.raises(StepError, match=message):
            await ctx.wait_for("approval")

    assert await worker.run(handler) == Succeeded(None)


async def test_one_name_from_two_tasks_is_an_error(worker: Worker) -> None:
    async def handler(ctx: Context[Any, Any]) -> None:
        async def nap() -> None:
            await ctx.sleep("1h")

        with pytest.RaisesGroup(StepError):
            async with asyncio.TaskGroup() as group:
                group.create_task(nap())
                group.create_task(nap())

    assert await worker.run(handler) == Succeeded(None)


def swallow(ctx: BlockingContext[Any, Any]) -> str:
    with suppress(BaseException):
        ctx.wait_for("approval")
    return "swallowed"


def swallow_and_step(ctx: BlockingContext[Any, Any]) -> str:
    with suppress(BaseException):
        ctx.wait_for("approval")
    ctx.step("after", lambda: "called")
    return "swallowed"


def exit_after(ctx: BlockingContext[Any, Any]) -> str:
    try:
        ctx.wait_for("approval")
    except BaseException:
        raise SystemExit(3) from None
    return "answered"


@pytest.mark.parametrize("handler", [swallow, swallow_and_step, exit_after])
def test_no_blocking_handler_swallows_a_park(worker: Worker, handler: BlockingHandler) -> None:
    assert worker.run_blocking(handler) == Parked("answer", "approval")
    assert worker.parks == [Parked("answer", "approval")]
    assert worker.steps == []


def test_a_blocking_handler_goes_on_with_the_answer(worker: Worker) -> None:
    def handler(ctx: BlockingContext[Any, Any]) -> Any:
        ctx.sleep("1h")
        return ctx.wait_for("approval")

    assert worker.run_blocking(handler) == Parked("asleep")
    worker.states["sleep"] = WaitState("sleep", "over")
    assert worker.run_blocking(handler) == Parked("answer", "approval")
    worker.answer("approval", "7")
    assert worker.run_blocking(handler) == Succeeded("7")


def test_a_parked_blocking_handler_makes_no_other_call(worker: Worker) -> None:
    def handler(ctx: BlockingContext[Any, Any]) -> None:
        with suppress(BaseException):
            ctx.wait_for("approval")
        for use in (lambda: ctx.save(1), lambda: ctx.step("a", int), lambda: ctx.wait_for("other")):
            with pytest.raises(Parking):
                use()

    assert isinstance(worker.run_blocking(handler), Parked)
    assert worker.saved == []


def test_a_blocking_wait_lets_steps_of_other_threads_end(worker: Worker) -> None:
    begun, gate = threading.Event(), threading.Event()

    def pay() -> str:
        begun.set()
        gate.wait()
        return "receipt"

    def handler(ctx: BlockingContext[Any, Any]) -> None:
        thread = threading.Thread(target=lambda: ctx.step("pay", pay))
        thread.start()
        begun.wait()
        threading.Timer(0.05, gate.set).start()
        ctx.wait_for("approval")

    assert isinstance(worker.run_blocking(handler), Parked)
    assert [step.result_json for step in worker.steps] == ['"receipt"']


async def test_options_are_sent_as_plain_values(worker: Worker) -> None:
    class Answer(StrEnum):
        YES = "yes"
        NO = "no"

    async def handler(ctx: Context[Any, Any]) -> Any:
        return await ctx.wait_for("approval", options=list(Answer))

    def blocking(ctx: BlockingContext[Any, Any]) -> Any:
        return ctx.wait_for("number", options=(1, None))

    assert await worker.run(handler) == Parked("answer", "approval")
    assert worker.run_blocking(blocking) == Parked("answer", "number")

    assert [wait.options for wait in worker.waits] == [("yes", "no"), (1, None)]
    assert type(worker.waits[0].options[0]) is str


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "options of wait_for approval: give a list of 1 to 50"),
        ("yes", "options of wait_for approval: give a list of 1 to 50"),
        (["yes", {}], "options of wait_for approval: number 2 is not a text"),
        ([float("nan")], "options of wait_for approval is not JSON"),
        (["\0"], "options of wait_for approval contains a NUL"),
        (["x" * 16_400], "options of wait_for approval is 16.0 KiB of JSON; the maximum is 16 KiB"),
        (["x" * 9_000], "ask and options of wait_for approval is 17"),
    ],
)
async def test_options_that_cannot_be_stored_fail_the_call(
    worker: Worker, options: Any, problem: str
) -> None:
    """The control: without options the same `ask` is sent."""
    ask = "y" * 9_000

    async def handler(ctx: Context[Any, Any]) -> Any:
        return await ctx.wait_for("approval", ask=ask, options=options)

    def blocking(ctx: BlockingContext[Any, Any]) -> Any:
        return ctx.wait_for("approval", ask=ask, options=options)

    for outcome in (await worker.run(handler), worker.run_blocking(blocking)):
        assert isinstance(outcome, Failed)
        assert problem in outcome.error.message
    assert worker.waits == []
    options = None
    assert await worker.run(handler) == Parked("answer", "approval")
