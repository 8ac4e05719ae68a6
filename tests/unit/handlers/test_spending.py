"""`ctx.spend` and `ctx.budget`: counted once, with the step or outside of it, and stopped at the limit."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock, settle
from tests.unit.handlers.test_context import given
from worker import BudgetExceeded, StepError
from worker.handlers import spending
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calling import outcome_of_error
from worker.handlers.calls import MAX_METERS, MAX_USED, AskBudgets, CountSpend, OpenWait
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation
from worker.handlers.spending import Budget
from worker.model.definitions.budgets import MAX_AMOUNT
from worker.model.prices import ModelUsage
from worker.model.runs.budgets import BudgetState, OrgBudgets
from worker.model.runs.outcome import Failed, Parked
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait, WaitState

METER = "llm_tokens"


class Org:
    """The worker's side: one budget of one meter, the spends of a run, and how its waits stand."""

    def __init__(self, clock: ManualClock, limit: int | None = 100, at_limit: Any = "fail") -> None:
        self.clock, self.limit, self.at_limit = clock, limit, at_limit
        self.steps: list[NewStep] = []
        self.spent: list[tuple[str, int, int]] = []
        self.waits: list[NewWait] = []
        self.answers: list[str | None] = []
        self.asked = 0
        self.uses = True
        self.parked: list[Parked] = []

    def states(self) -> list[BudgetState]:
        used = sum(amount for step in self.steps for _, amount in step.spends)
        used += sum(amount for _, amount, _ in self.spent)
        if self.limit is None:
            return []
        return [
            BudgetState(
                METER, "day", self.limit, used, self.resets_at(), self.at_limit, uses=self.uses and used > 0
            )
        ]

    def resets_at(self) -> Any:
        return self.clock.now() + timedelta(hours=6)

    def budgets(self) -> list[BudgetState]:
        self.asked += 1
        return self.states()

    def spend(self, meter: str, amount: int, number: int) -> list[BudgetState]:
        self.spent.append((meter, amount, number))
        return self.states()

    def open_wait(self, wait: NewWait) -> WaitState:
        self.waits.append(wait)
        if self.answers:
            answer = self.answers.pop(0)
            if answer is not None and json.loads(answer) is not False and self.limit is not None:
                self.limit += json.loads(answer)["by"]
            return WaitState("budget", "over" if answer is None else "answered", answer)
        return WaitState("budget", "pending")

    def port(self, *, suspends: bool = False) -> AnsweringWorker:
        def spend(call: CountSpend) -> OrgBudgets:
            attempt, _, number = call.key.partition(":")
            assert attempt == "1"
            return OrgBudgets(self.spend(call.meter, call.amount, int(number)))

        answers = {
            AskBudgets: lambda call: OrgBudgets(self.budgets()),
            CountSpend: spend,
            OpenWait: lambda call: self.open_wait(call.wait),
        }
        return AnsweringWorker(answers, suspends, steps=self.steps)

    def given(self) -> Any:
        data = given(self.clock)
        data.replays = True
        data.budgets = None if self.limit is None else tuple(self.states())
        return data

    def context(self) -> Context[Any, Any]:
        return Context(self.given(), self.port(suspends=True), Cancellation(), on_park=self.parked.append)

    def blocking(self) -> BlockingContext[Any, Any]:
        return BlockingContext(self.given(), self.port(), BlockingCancellation(), on_park=self.parked.append)


async def test_a_spend_inside_a_step_is_stored_with_the_step_and_not_made_again(clock: ManualClock):
    org = Org(clock)

    async def ask(ctx: Context[Any, Any]) -> str:
        await ctx.spend(METER, 30)
        await ctx.spend(METER, 5)
        await ctx.spend("calls", 1)
        return "hi"

    for _ in range(2):
        ctx = org.context()
        assert await ctx.step("ask", ask, ctx) == "hi"

    assert [step.spends for step in org.steps] == [((METER, 35), ("calls", 1))]
    assert org.spent == []


async def test_the_spends_of_a_step_are_added_up_as_far_as_one_may_go(clock: ManualClock):
    org = Org(clock)

    async def spend(ctx: Context[Any, Any]) -> None:
        for amount in (MAX_AMOUNT - 1, 1, 5, 5):
            await ctx.spend(METER, amount)

    ctx = org.context()
    await ctx.step("ask", spend, ctx)

    assert org.steps[0].spends == ((METER, MAX_AMOUNT), (METER, 10))


@pytest.mark.parametrize("more", [0, 1], ids=["control", ""])
async def test_a_step_spends_of_no_more_meters_than_a_worker_takes(clock: ManualClock, more: int):
    org = Org(clock)

    async def spend(ctx: Context[Any, Any]) -> None:
        for number in range(MAX_METERS + more):
            await ctx.spend(f"m{number}", 1)

    ctx = org.context()
    with pytest.raises(StepError, match="more than 1,000 meters") if more else nullcontext():
        await ctx.step("ask", spend, ctx)

    assert [len(step.spends) for step in org.steps] == ([] if more else [MAX_METERS])


async def test_a_function_that_blocks_spends_without_waiting(clock: ManualClock):
    org = Org(clock)
    ctx = org.context()

    await ctx.step("ask", lambda: ctx.spend(METER, 7) and None)

    assert org.steps[0].spends == ((METER, 7),)


async def test_a_failed_try_of_a_step_spends_nothing(clock: ManualClock):
    org = Org(clock)
    ctx, tries = org.context(), iter((1, 2))

    async def ask() -> int:
        number = next(tries)
        await ctx.spend(METER, 10 * number)
        if number == 1:
            raise ValueError("not yet")
        return number

    assert await ctx.step("ask", ask, retries=1, backoff=0) == 2

    assert org.steps[0].spends == ((METER, 20),)


async def test_spends_outside_of_steps_are_numbered_in_the_attempt(clock: ManualClock):
    org = Org(clock)
    ctx = org.context()

    await ctx.spend(METER, 30)
    await ctx.spend(METER, 30)

    assert org.spent == [(METER, 30, 1), (METER, 30, 2)]


async def test_a_run_of_an_org_without_budgets_asks_nothing(clock: ManualClock):
    org = Org(clock, limit=None)
    ctx = org.context()

    async def ask() -> None:
        await ctx.spend(METER, 10**6)

    await ctx.step("ask", ask)
    await ctx.step("ask", ask)

    assert org.asked == 0
    assert await ctx.budget(METER) == Budget(None, 0, None, None)


async def test_a_budget_that_is_used_up_stops_before_the_next_new_step_and_not_before_a_replayed_one(
    clock: ManualClock,
):
    org = Org(clock)
    calls = []

    async def handler(ctx: Context[Any, Any]) -> None:
        async def ask(number: int) -> int:
            calls.append(number)
            await ctx.spend(METER, 60)
            return number

        for number in range(3):
            assert await ctx.step("ask", ask, number) == number

    for _ in range(2):
        with pytest.raises(BudgetExceeded, match="120 of 100"):
            await handler(org.context())

    # The spend that crosses the limit counts; the third call is never made.
    assert calls == [0, 1]


async def test_a_meter_that_the_definition_does_not_use_stops_nothing(clock: ManualClock):
    org = Org(clock, limit=0)
    org.uses = False

    assert await org.context().step("ask", lambda: 1) == 1


async def test_an_exceeded_budget_fails_the_run_without_a_retry(clock: ManualClock):
    outcome = outcome_of_error(BudgetExceeded("used up"))

    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.permanent) == ("budget", True)


@pytest.mark.parametrize("at_limit", ["wait", "ask"])
async def test_at_the_limit_the_attempt_parks_until_the_period_ends(clock: ManualClock, at_limit: str):
    org = Org(clock, limit=10, at_limit=at_limit)
    async with asyncio.TaskGroup() as tasks:

        async def handler() -> None:
            ctx = org.context()
            await ctx.spend(METER, 10)
            await ctx.step("ask", lambda: 1)

        task = tasks.create_task(handler())
        await settle(200)

    assert task.cancelled()
    [wait] = org.waits
    assert (wait.name, wait.occurrence, wait.kind) == ("budget:llm_tokens", 1, "budget")
    assert wait.seconds is not None
    assert abs(wait.seconds - timedelta(hours=6).total_seconds()) <= 2
    if at_limit == "ask":
        assert json.loads(wait.ask_json or "")["used"] == 10
    else:
        assert wait.ask_json is None
    assert org.parked == [Parked("budget", "llm_tokens")]
    assert org.steps == []


async def test_a_raised_budget_goes_on_and_a_second_limit_is_another_wait(clock: ManualClock):
    org = Org(clock, limit=10, at_limit="ask")
    org.answers = ['{"by": 5}', '{"by": 100}']
    ctx = org.context()

    for number in range(3):
        await ctx.spend(METER, 10)
        assert await ctx.step("ask", lambda number=number: number) == number

    assert [(wait.name, wait.occurrence) for wait in org.waits] == [
        ("budget:llm_tokens", 1),
        ("budget:llm_tokens", 2),
    ]


async def test_an_operator_who_says_no_fails_the_run(clock: ManualClock):
    org = Org(clock, limit=10, at_limit="ask")
    org.answers = ["false"]
    ctx = org.context()
    await ctx.spend(METER, 10)

    with pytest.raises(BudgetExceeded, match="did not raise"):
        await ctx.spend(METER, 1)
    assert org.spent == [(METER, 10, 1)]


async def test_a_map_stops_between_items_and_goes_on_where_it_stopped(clock: ManualClock):
    org = Org(clock, limit=20, at_limit="ask")
    org.answers = ['{"by": 1000}']
    ctx = org.context()

    async def ask(item: int) -> int:
        await ctx.spend(METER, 10)
        return item * item

    assert await ctx.map("squares", ask, range(10), concurrency=2) == [n * n for n in range(10)]

    assert len(org.steps) == 10
    [wait] = org.waits
    # At most the calls in flight are above the limit.
    assert json.loads(wait.ask_json or "")["used"] <= 30


async def test_a_map_parks_when_nothing_is_in_flight(clock: ManualClock):
    org = Org(clock, limit=20, at_limit="wait")
    async with asyncio.TaskGroup() as tasks:

        async def handler() -> None:
            ctx = org.context()

            async def ask(item: int) -> int:
                await ctx.spend(METER, 10)
                return item

            await ctx.map("items", ask, range(10), concurrency=3)

        tasks.create_task(handler())
        await settle(200)

    assert 2 <= len(org.steps) <= 4


async def test_the_budget_is_as_last_known_and_now_if_awaited(clock: ManualClock):
    org = Org(clock)
    ctx = org.context()
    await ctx.spend(METER, 30)

    known = ctx.budget(METER)
    assert (known.limit, known.used, known.left) == (100, 30, 70)
    org.limit = 200
    now = await ctx.budget(METER)
    assert (now.limit, now.used, now.left, now.resets_at) == (200, 30, 170, org.resets_at())


@pytest.mark.parametrize(
    ("meter", "amount"),
    [
        *(("two words", 1), (METER, -1), (METER, 1.5), (METER, True), (METER, 10**16)),
        *(("runs", 1), ("egress_requests", 1)),
    ],
)
async def test_a_wrong_spend_is_an_error_that_names_it(clock: ManualClock, meter: str, amount: Any):
    org = Org(clock)

    with pytest.raises(StepError, match="spend|meter"):
        org.context().spend(meter, amount)
    with pytest.raises(StepError):
        org.blocking().spend(meter, amount)
    assert org.spent == []


def test_a_handler_that_blocks_has_the_same(clock: ManualClock):
    org = Org(clock, limit=30, at_limit="ask")
    org.answers = ['{"by": 30}']
    ctx = org.blocking()

    def ask(item: int) -> int:
        ctx.spend(METER, 10)
        return item

    ctx.spend(METER, 5)
    assert ctx.budget(METER).left == 25
    assert ctx.map("items", ask, range(5), concurrency=1) == list(range(5))

    assert [step.spends for step in org.steps] == [((METER, 10),)] * 5
    assert len(org.waits) == 1
    ctx.spend(METER, 5)
    org.answers = ["false"]
    with pytest.raises(BudgetExceeded):
        ctx.step("ask", ask, 1)


async def test_an_attempt_has_a_limit_of_spends_outside_of_steps(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(spending, "MAX_SPENDS", 2)
    org = Org(clock)
    ctx = org.context()
    for _ in range(2):
        await ctx.spend(METER, 1)

    with pytest.raises(StepError, match="the limit"):
        await ctx.spend(METER, 1)
    assert len(org.spent) == 2


# --- Spends of models. ---


async def test_a_spend_of_a_model_counts_its_tokens_and_says_what_it_used(clock: ManualClock):
    org = Org(clock)

    async def ask(ctx: Context[Any, Any]) -> None:
        await ctx.spend(
            METER, {"input": 30, "output": 5, "web_search": 2}, model="gpt-5-mini", provider="openai"
        )
        await ctx.spend("searches", 3, model="gpt-5-mini", kind="web_search")
        await ctx.spend(METER, 1)

    ctx = org.context()
    await ctx.step("ask", ask, ctx)

    [step] = org.steps
    assert step.spends == ((METER, 36), ("searches", 3))
    assert step.used == (
        ModelUsage("openai", "gpt-5-mini", (("input", 30), ("output", 5), ("web_search", 2))),
        ModelUsage(None, "gpt-5-mini", (("web_search", 3),)),
    )


async def test_a_failed_try_used_nothing_of_a_model(clock: ManualClock):
    org = Org(clock)
    ctx, tries = org.context(), iter((1, 2))

    async def ask() -> None:
        number = next(tries)
        await ctx.spend(METER, number, model="m", kind="input")
        if number == 1:
            raise OSError

    with pytest.raises(OSError):
        await ctx.step("ask", ask)
    await ctx.step("ask", ask)

    assert [step.used for step in org.steps] == [(ModelUsage(None, "m", (("input", 2),)),)]


INPUT = {"kind": "input"}


@pytest.mark.parametrize("amount, how, named", [
    (5, {"kind": "input"}, "belong to a model"), ({"input": 5}, {}, "belong to a model"),
    (5, {"model": "m"}, "its kind"), ({"input": 5}, {"model": "m", "kind": "input"}, "its kind"),
    (5, {"model": "m", "kind": "batch"}, "'batch' is not a kind"), ({"x": 5}, {"model": "m"}, "'x' is not"),
    (-5, {"model": "m", "kind": "input"}, "whole number"), ({"input": 0.5}, {"model": "m"}, "whole number"),
    (5, {"model": "two words"} | INPUT, "name of a model"), (5, {"model": ""} | INPUT, "name"),
    (5, {"model": "m", "provider": "x" * 201, "kind": "input"}, "name of a model or provider"),
])  # fmt: skip
async def test_a_wrong_spend_of_a_model_is_refused(clock: ManualClock, amount: Any, how: Any, named: str):
    with pytest.raises(StepError, match=named):
        await Org(clock).context().spend(METER, amount, **how)


async def test_no_run_spends_money(clock: ManualClock):
    with pytest.raises(StepError, match="orgworker counts this meter itself"):
        await Org(clock).context().spend("money", 5)


async def test_a_step_with_many_requests_adds_up_the_last_ones_by_model(clock: ManualClock):
    org = Org(clock)

    async def ask(ctx: Context[Any, Any]) -> None:
        for number in range(MAX_USED + 50):
            await ctx.spend(METER, 2, model=f"m{number % 2}", kind="input")

    ctx = org.context()
    await ctx.step("ask", ask, ctx)

    [step] = org.steps
    assert (len(step.used), step.spends) == (MAX_USED, ((METER, 2 * (MAX_USED + 50)),))
    assert sum(usage.tokens for usage in step.used) == 2 * (MAX_USED + 50)


async def test_a_step_with_requests_to_too_many_models_fails(clock: ManualClock):
    async def ask(ctx: Context[Any, Any]) -> None:
        for number in range(MAX_USED + 1):
            await ctx.spend(METER, 2, model=f"m{number}", kind="input")

    ctx = Org(clock).context()
    with pytest.raises(StepError, match="more than 100 models"):
        await ctx.step("ask", ask, ctx)
