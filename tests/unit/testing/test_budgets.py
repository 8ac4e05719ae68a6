"""Budgets in `orgworker.run`: limits, what a run spent, and the usage of a model's answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from worker import BlockingContext, BudgetExceeded, Context, job
from worker.errors import DefinitionError
from worker.testing import Crash

ANSWER = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42}}


@job("t.spender")
async def spender(ctx: Context[Any, Any]) -> int:
    async def ask(number: int) -> int:
        await ctx.spend("llm_tokens", 40)
        return number

    for number in range(ctx.params.get("steps", 3)):
        await ctx.step("ask", ask, number)
    return (await ctx.budget("llm_tokens")).used


@job("t.blocking_spender")
def blocking_spender(ctx: BlockingContext[Any, Any]) -> int:
    for number in range(3):
        ctx.step("ask", ctx.spend, "llm_tokens", 40, key=number)
    return ctx.budget("llm_tokens").used


@job("t.graceful")
async def graceful(ctx: Context[Any, Any]) -> str:
    await ctx.spend("llm_tokens", 100)
    try:
        await ctx.spend("llm_tokens", 1)
    except BudgetExceeded:
        return "partly"
    return "all"


@job("t.metered")
async def metered(ctx: Context[Any, Any]) -> int:
    async def ask() -> int:
        return (await ctx.http.post("https://api.example.com/chat", json={})).status_code

    return int(await ctx.step("ask", ask))


@pytest.mark.parametrize("handler", [spender, blocking_spender])
def test_a_run_fails_at_its_limit_and_says_what_it_spent(orgworker, handler):
    run = orgworker.run(handler, budgets={"llm_tokens": 50})

    assert (run.state, run.reason) == ("failed", "budget")
    assert (run.spends, len(run.attempts)) == ({"llm_tokens": 80}, 1)


@pytest.mark.parametrize("handler", [spender, blocking_spender])
def test_a_run_within_its_limit_succeeds(orgworker, handler):
    run = orgworker.run(handler, budgets={"llm_tokens": 500})

    assert (run.state, run.result, run.spends) == ("succeeded", 120, {"llm_tokens": 120})


def test_a_run_without_budgets_spends_as_it_likes(orgworker):
    run = orgworker.run(spender)

    assert (run.result, run.spends) == (0, {"llm_tokens": 120})


def test_a_handler_may_end_in_its_own_way_at_the_limit(orgworker):
    run = orgworker.run(graceful, budgets={"llm_tokens": 100})

    assert (run.result, run.spends) == ("partly", {"llm_tokens": 100})


def test_a_killed_attempt_spends_nothing_twice(orgworker):
    run = orgworker.run(spender, faults=[Crash(after_step=2)])

    assert (run.state, run.spends, len(run.attempts)) == ("succeeded", {"llm_tokens": 120}, 2)


def test_a_limit_comes_from_the_token(orgworker):
    budget = {"llm_tokens": {"limit_from": "property:daily_tokens", "per": "day", "at_limit": "fail"}}

    enough = orgworker.run(spender, budgets=budget, properties={"daily_tokens": "500"})
    missing = orgworker.run(spender, budgets=budget)

    assert enough.state == "succeeded"
    assert (missing.state, missing.reason, missing.detail) == ("refused", "property_missing", "daily_tokens")


def test_the_usage_of_an_answer_is_counted_if_the_definition_says_so(orgworker):
    def api(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=ANSWER)

    counted = orgworker.run(metered, api=api, definition={"meter_usage": True})
    not_counted = orgworker.run(metered, api=api)

    assert (counted.spends, not_counted.spends) == ({"llm_tokens": 42}, {})


def test_a_wrong_budget_is_named(orgworker):
    with pytest.raises(DefinitionError, match="llm_tokens"):
        orgworker.run(spender, budgets={"llm_tokens": {"limit": 1}})


def test_a_run_waits_for_the_next_day_at_a_limit_that_says_so(orgworker):
    run = orgworker.run(spender, budgets={"llm_tokens": {"limit": 50, "per": "day"}})

    assert [attempt.outcome for attempt in run.attempts] == ["parked", "succeeded"]
    assert (run.state, run.spends) == ("succeeded", {"llm_tokens": 120})
