"""What a host or a process says of models is read part by part, and an agent's response by kind."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_ai.messages import ModelResponse
from pydantic_ai.usage import RequestUsage

from worker.handlers.agents import _provider_of, kinds_of
from worker.handlers.calls import STEP, CountSpend
from worker.model.definitions.budgets import MAX_AMOUNT
from worker.model.prices import ModelUsage
from worker.model.runs.run import NewStep

USAGE = {"provider": "openai", "model": "gpt-5-mini", "kinds": [["input", 5], ["output", 1]]}
SPEND = {"meter": "llm_tokens", "amount": 6, "key": "1:1"}


def test_a_spend_of_a_model_travels_and_one_without_is_as_it_was():
    read = CountSpend.row.read({**SPEND, "used": USAGE})

    assert read.used == ModelUsage("openai", "gpt-5-mini", (("input", 5), ("output", 1)))
    assert CountSpend.row.write(read) == {**SPEND, "used": USAGE}
    # A worker of the previous release reads the rest.
    assert CountSpend.row.write(CountSpend.row.read(SPEND)) == SPEND


@pytest.mark.parametrize("change", [
    {"model": "two words"}, {"model": 5}, {"model": None}, {"provider": "x" * 201}, {"provider": ""},
    {"kinds": [["batch", 5]]}, {"kinds": [["input", -1]]}, {"kinds": [["input", MAX_AMOUNT + 1]]},
    {"kinds": [["input", True]]}, {"kinds": [["input", 1], ["input", 1]]}, {"kinds": [["input"]]},
    {"kinds": [["input", 1]] * 50}, {"kinds": None},
])  # fmt: skip
def test_what_a_host_makes_up_is_refused(change: dict[str, Any]):
    with pytest.raises((ValueError, TypeError, LookupError)):
        CountSpend.row.read({**SPEND, "used": {**USAGE, **change}})


def test_no_host_says_what_it_costs():
    """A price or tariff that it adds is ignored, and `money` is not a meter of runs."""
    read = CountSpend.row.read({**SPEND, "used": {**USAGE, "money": 1, "tariff": "batch"}})

    assert read == CountSpend.row.read({**SPEND, "used": USAGE})
    with pytest.raises(ValueError, match="counts this meter itself"):
        CountSpend.row.read({**SPEND, "meter": "money"})


def test_a_step_names_at_most_100_uses(clock):
    at = clock.now()
    step = NewStep("s", None, 1, 1, "1", at, at, (), (ModelUsage(None, "m", (("input", 1),)),))
    written = STEP.write(step)

    assert STEP.read(written) == step
    with pytest.raises(ValueError, match="at most 100"):
        STEP.read({**written, "used": written["used"] * 101})


def test_kinds_are_disjoint_and_add_up_to_the_total():
    usage = RequestUsage(
        input_tokens=100, cache_read_tokens=40, cache_write_tokens=30, cache_write_1h_tokens=10,
        output_tokens=50, output_reasoning_tokens=20,
    )  # fmt: skip

    kinds = kinds_of(usage)

    assert kinds == {
        "input": 30, "cache_read": 40, "cache_write": 20, "cache_write_1h": 10, "output": 30, "reasoning": 20,
    }  # fmt: skip
    assert sum(kinds.values()) == usage.total_tokens


def test_a_usage_that_contradicts_itself_counts_at_the_full_price():
    usage = RequestUsage(input_tokens=10, cache_read_tokens=40, output_tokens=5, output_reasoning_tokens=9)

    assert kinds_of(usage) == {"input": 10, "output": 5}
    assert kinds_of(RequestUsage()) == {}


def test_billed_calls_are_kinds():
    usage = RequestUsage(input_tokens=1, web_searches=3)

    assert kinds_of(usage) == {"input": 1, "web_search": 3}


@pytest.mark.parametrize("url, provider", [
    ("https://api.anthropic.com/v1", "anthropic"), ("http://localhost:8000", "openai"), (None, "openai"),
])  # fmt: skip
def test_the_provider_is_that_of_the_url(url: str | None, provider: str):
    response = ModelResponse([], model_name="m", provider_name="openai", provider_url=url)

    assert _provider_of(response) == provider
