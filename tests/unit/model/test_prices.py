"""Prices: exact amounts by kind, tariff and day; own prices before those of the list; what has no price."""

from __future__ import annotations

import json
import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from genai_prices.data import providers
from genai_prices.types import Usage

from worker.kit.output import amounts
from worker.model.money import MAX_MONEY, money_text, parse_money
from worker.model.price_list import GenaiPrices
from worker.model.prices import (
    INPUT_KINDS,
    TOKEN_KINDS,
    ModelUsage,
    OwnPrice,
    Prices,
    model_name,
)

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)
LISTED = GenaiPrices.released()
PRICES = Prices(LISTED, per_usd=Fraction(1))


def usage(model: str, provider: str | None = None, **kinds: int) -> ModelUsage:
    return ModelUsage(provider, model, tuple(kinds.items()))  # type: ignore[arg-type]


def own(model: str, **rates: str) -> OwnPrice:
    return OwnPrice(model, {kind: Fraction(rate) for kind, rate in rates.items()})  # type: ignore[misc]


def money_of(prices: Prices, used: ModelUsage, **how: object) -> dict[str, int | None]:
    return {each.kind: each.money for each in prices.price(used, at=NOW, **how).kinds}  # type: ignore[arg-type]


def test_each_kind_is_exact_in_nano_units():
    """0.25 USD a million tokens are 250 nano-USD a token; a part of a nano-unit counts as a whole one."""
    used = usage("gpt-5-mini", "openai", input=1200, cache_read=1001, output=80, reasoning=20, web_search=3)

    assert money_of(PRICES, used) == {
        "input": 300_000,
        "cache_read": 25_025,
        "output": 160_000,
        "reasoning": 40_000,
        "web_search": 30_000_000,
    }
    assert PRICES.price(used, at=NOW).money == 30_525_025
    assert money_of(PRICES, usage("gpt-5-nano", "openai", cache_read=1)) == {"cache_read": 5}
    tiny = Prices(own=[own("m", input="0.0000001")])
    assert money_of(tiny, usage("m", input=1)) == {"input": 1}


def test_a_list_of_all_models_agrees_with_the_package():
    """The package's own calculation, which takes inclusive counts, comes to the same up to the rounding."""
    random_ = random.Random(1)
    seen = 0
    for provider in providers:
        for model in provider.models:
            found = LISTED.find(provider.id, model.id, tariff="standard", at=NOW, prompt=0)
            if found is None or (found.provider, found.model) != (provider.id, model.id):
                continue  # another model of the provider matches the name first
            prices = model.get_prices(NOW)
            if "input_mtok" not in prices.__dict__ or "output_mtok" not in prices.__dict__:
                continue
            if prices.__dict__.keys() & {"input_characters_mchars", "audio_hours", "output_citation_mtok"}:
                continue
            kinds = {kind: random_.randrange(1, 300_000) for kind in TOKEN_KINDS}
            inclusive = Usage(
                input_tokens=sum(kinds[kind] for kind in INPUT_KINDS),
                cache_read_tokens=kinds["cache_read"],
                cache_write_tokens=kinds["cache_write"] + kinds["cache_write_1h"],
                cache_write_1h_tokens=kinds["cache_write_1h"],
                output_tokens=kinds["output"] + kinds["reasoning"],
                output_reasoning_tokens=kinds["reasoning"],
            )
            for tariff in ("standard", "batch"):
                context = {"processing": "batch"} if tariff == "batch" else None
                with localcontext() as exact:
                    exact.prec = 60
                    theirs = model.calc_price(
                        inclusive, provider, genai_request_timestamp=NOW, price_context=context
                    )
                ours = PRICES.price(usage(model.id, provider.id, **kinds, request=1), at=NOW, tariff=tariff)
                assert not ours.unpriced
                difference = Decimal(ours.money or 0) - theirs.total_price * 10**9
                assert 0 <= difference < len(ours.kinds), (provider.id, model.id, tariff)
                seen += 1
    assert seen > 3000


def test_a_long_prompt_has_the_price_of_its_step():
    short = usage("claude-sonnet-4-5", "anthropic", input=200_000, output=10)
    long = usage("claude-sonnet-4-5", "anthropic", input=100_000, cache_read=100_001, output=10)

    assert money_of(PRICES, short) == {"input": 600_000_000, "output": 150_000}
    assert money_of(PRICES, long) == {"input": 600_000_000, "cache_read": 60_000_600, "output": 225_000}


def test_the_batch_tariff_halves_tokens_and_leaves_tool_calls():
    used = usage("gpt-5-mini", "openai", input=1000, output=100, web_search=1)

    assert money_of(PRICES, used, tariff="batch") == {
        "input": 125_000, "output": 100_000, "web_search": 10_000_000,
    }  # fmt: skip
    assert PRICES.has_batch("openai", "gpt-5-mini", NOW)
    assert not PRICES.has_batch("openai", "gpt-5-mini", datetime(2026, 1, 1, tzinfo=UTC))
    assert not PRICES.has_batch("azure", "gpt-5-mini", NOW)
    assert not PRICES.has_batch(None, "no-such-model", NOW)


def test_a_price_changes_on_its_day():
    before = datetime(2026, 8, 20, 23, 59, tzinfo=UTC)
    used = usage("gpt-5.6-sol", "openai", input=1_000_000)

    old, new = PRICES.price(used, at=before), PRICES.price(used, at=before + timedelta(minutes=2))

    assert old.money != new.money
    assert (old.kinds[0].since, new.kinds[0].since) == (None, date(2026, 8, 21))
    assert new.kinds[0].source == LISTED.version


def test_what_has_no_price_is_unpriced_and_not_free():
    unknown = PRICES.price(usage("house-model", input=10, output=5, request=1), at=NOW)
    other = PRICES.price(usage("gpt-5-mini", "no-such-provider", input=10), at=NOW)
    part = Prices(own=[own("m", input="1")]).price(usage("m", input=10, output=5), at=NOW)

    assert unknown.money is None and unknown.unpriced == ("input", "output")
    assert (unknown.provider, unknown.model) == (None, "house-model")
    assert other.money is None
    assert part.money == 10_000 and part.unpriced == ("output",)
    free = Prices(own=[own("m", input="0", output="0")]).price(usage("m", input=10, output=5), at=NOW)
    assert free.money == 0 and not free.unpriced


def test_own_prices_come_first():
    """The price of an org before that of all, a name before a pattern, and of equal ones the latest."""
    prices = Prices(
        LISTED,
        [
            OwnPrice("gpt-5*", {"input": Fraction(9)}),
            OwnPrice("gpt-5-mini", {"input": Fraction(1)}),
            OwnPrice("gpt-5-mini", {"input": Fraction(2)}, start=date(2026, 12, 1)),
            OwnPrice("gpt-5-mini", {"input": Fraction(3)}, start=date(2026, 12, 2)),
            OwnPrice("*", {}, factor=Fraction("1.5"), org="acme"),
            OwnPrice("gpt-5-mini", {"request": Fraction("0.01")}),
        ],
        per_usd=Fraction(1),
    )
    used = usage("gpt-5-mini", "openai", input=1000, cache_read=10, output=100, request=2)

    priced = prices.price(used, at=NOW)
    of_org = prices.price(used, at=NOW, org="acme")

    assert money_of(prices, used) == {
        "input": 2_000_000, "cache_read": 20_000, "output": 200_000, "request": 20_000_000,
    }  # fmt: skip
    assert (priced.kinds[0].since, priced.kinds[0].source) == (date(2026, 12, 1), "worker.toml")
    assert {each.kind: each.money for each in of_org.kinds} == {
        "input": 375_000, "cache_read": 375, "output": 300_000, "request": 20_000_000,
    }  # fmt: skip
    assert prices.has_org_prices
    assert money_of(prices, usage("gpt-5-nano", "openai", input=1)) == {"input": 9_000}


def test_another_currency_needs_its_rate():
    euro = Prices(LISTED, currency="EUR", per_usd=Fraction("0.92"))
    used = usage("gpt-5-mini", "openai", input=1000)

    assert money_of(euro, used) == {"input": 230_000}
    assert money_of(Prices(LISTED, currency="EUR"), used) == {"input": None}


def test_an_absurd_number_is_capped():
    used = usage("claude-opus-4-6", "anthropic", input=10**15, output=10**15)

    assert PRICES.price(used, at=NOW).money == MAX_MONEY


@pytest.mark.parametrize("pattern, name, is_one", [
    ("gpt-5*", "gpt-5-mini", True), ("gpt-5*", "gpt-4", False), ("*", "x", True), ("a*b*c", "aXbYc", True),
    ("a*b*c", "acb", False), ("ab*ba", "aba", False), ("gpt", "gpt-5", False), ("*mini", "gpt-5-mini", True),
])  # fmt: skip
def test_a_pattern_of_names(pattern: str, name: str, is_one: bool):
    prices = Prices(own=[own(pattern, input="1")])

    assert (prices.price(usage(name, input=1), at=NOW).money is not None) == is_one


def test_a_file_of_prices_is_read_as_the_package_does():
    data = [{
        "id": "house", "name": "House", "api_pattern": "https://models\\.house",
        "models": [{
            "id": "small", "match": {"starts_with": "small"},
            "prices": [
                {"prices": {"input_mtok": 1}},
                {"constraint": {"start_date": "2026-11-01"}, "prices": {"input_mtok": 0.5, "output_mtok": 2}},
            ],
        }],
    }]  # fmt: skip
    listed = GenaiPrices.parse(json.dumps(data).encode(), "file")

    found = Prices(listed, per_usd=Fraction(1)).price(usage("small-2", "house", input=10, output=1), at=NOW)

    assert [(each.kind, each.money, each.since) for each in found.kinds] == [
        ("input", 5_000, date(2026, 11, 1)), ("output", 2_000, date(2026, 11, 1)),
    ]  # fmt: skip
    assert listed.models() == [("house", "small")]
    for wrong in (b"{}", b"[]", b"[1]", b"not json", b'[{"id": 1}]', b"[" * 100_000):
        with pytest.raises(ValueError, match="price list"):
            GenaiPrices.parse(wrong, "file")


def test_lookups_of_made_up_models_are_not_kept():
    listed = GenaiPrices.released()
    for number in range(3000):
        listed.find("openai", f"made-up-{number}", tariff="standard", at=NOW, prompt=0)

    assert listed._find.cache_info().currsize <= 1000


def test_names_of_models():
    assert model_name("anthropic/claude-sonnet-4-5:beta") == "anthropic/claude-sonnet-4-5:beta"
    for wrong in ("", "a b", "x" * 201, "\n", 5, None, "naïve"):
        with pytest.raises(ValueError, match="name of a model"):
            model_name(wrong)


def test_money_as_text():
    assert parse_money("20 USD") == (20 * 10**9, "USD")
    assert parse_money("0.000000001 EUR") == (1, "EUR")
    for wrong in (
        "20",
        "20USD",
        "-1 USD",
        "1e3 USD",
        "1.0000000001 USD",
        "20 usd",
        20,
        "٢٠ USD",
        "999999999 USD",
    ):
        with pytest.raises(ValueError, match="money"):
            parse_money(wrong)
    assert money_text(1_234_500_000_001, "USD") == "1,234.500000001 USD"
    assert money_text(20 * 10**9) == "20.00"
    assert money_text(-1) == "-0.000000001"


def test_money_that_a_run_spent_is_shown_as_money():
    assert amounts({"money": 30_025_000, "llm_tokens": 1280}) == {"money": "0.030025", "llm_tokens": 1280}
