"""What models cost: exact, once, at the price of its day; and budgets of money, which count it."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy import select

from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from tests.integration.store.test_spending import add_budget, admitted, states, step_of, used
from worker.errors import ConfigurationError
from worker.ids import OrgId, RunId
from worker.model.definitions.budgets import MAX_AMOUNT, MONEY
from worker.model.money import MAX_MONEY, NANO
from worker.model.price_list import GenaiPrices
from worker.model.prices import ModelUsage, OwnPrice, Prices
from worker.model.runs.run import AdmittedRun, RunStep
from worker.store import prices, spending, tables
from worker.store.sums import CappedSum
from worker.store.worker_store import WorkerStore

PRICES = Prices(GenaiPrices.released(), per_usd=Fraction(1))
METER = "llm_tokens"


def use(model: str = "gpt-5-mini", provider: str | None = "openai", **kinds: int) -> ModelUsage:
    return ModelUsage(provider, model, tuple(kinds.items()))  # type: ignore[arg-type]


def step_using(run: AdmittedRun, seq: int, *usages: ModelUsage) -> RunStep:
    row = step_of(run, seq, *((METER, usage.amount) for usage in usages))
    row.step.used = usages
    return row


def store(stock: Stock, *rows: RunStep, by: Prices = PRICES) -> spending.CountedSpends:
    return stock.within(spending.store_steps, rows, by)[1]


def money_of(stock: Stock, org_id: OrgId) -> int:
    return sum(
        row["amount"] for row in stock.all(tables.spends) if (row["org_id"], row["meter"]) == (org_id, MONEY)
    )


def test_a_step_counts_its_tokens_and_what_they_cost_once(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    row = step_using(run, 1, use(input=1000, output=100), use("gpt-5-nano", input=1000, cache_read=3))

    store(stock, row)
    counted = store(stock, row)

    spends = {(each["meter"], each["key"], each["amount"]) for each in stock.all(tables.spends)}
    assert spends == {(METER, "step:1", 2103), (MONEY, "step:1", 250_000 + 200_000 + 50_000 + 15)}
    lines = stock.all(tables.model_spends)
    assert sorted((each["place"], each["kind"], each["units"], each["money"]) for each in lines) == [
        (0, "input", 1000, 250_000), (0, "output", 100, 200_000),
        (1, "cache_read", 3, 15), (1, "input", 1000, 50_000),
    ]  # fmt: skip
    assert {(each["provider"], each["tariff"], each["price_source"]) for each in lines} == {
        ("openai", "standard", PRICES.listed.version)
    }
    days = stock.all(tables.model_days)
    assert sum(each["money"] for each in days) == money_of(stock, org_id) == 500_015
    assert sum(each["units"] for each in days) == 2103
    assert {each["meter"]: each["used"] for each in stock.all(tables.meter_days)} == {
        METER: 2103,
        MONEY: 500_015,
    }
    assert not counted.warned


def test_a_spend_outside_of_steps_is_priced_too_and_fenced(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)

    stock.within(spending.spend, run, METER, 10, "1:1", use(input=10), PRICES)
    stock.within(spending.spend, run, METER, 10, "1:1", use(input=10), PRICES)
    stock.change(tables.live_runs, run.id, fencing_token=run.fencing_token + 1)
    assert stock.within(spending.spend, run, METER, 10, "1:2", use(input=10), PRICES) is None

    assert money_of(stock, org_id) == 2500
    assert [row["money"] for row in stock.all(tables.model_spends)] == [2500]


def test_a_change_of_price_between_two_spends_changes_the_second(stock: Stock):
    """A repeated store of the first, with the new prices, leaves it as it was."""
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    dearer = Prices(own=[OwnPrice("gpt-5-mini", {"input": Fraction(1)}, start=date(2020, 1, 1))])
    first = step_using(run, 1, use(input=1000))

    store(stock, first)
    store(stock, first, step_using(run, 2, use(input=1000)), by=dearer)

    lines = {(each["key"], each["money"], each["price_since"], each["price_source"])
             for each in stock.all(tables.model_spends)}  # fmt: skip
    assert lines == {
        ("step:1", 250_000, None, PRICES.listed.version),
        ("step:2", 1_000_000, date(2020, 1, 1), "worker.toml"),
    }
    assert sum(each["money"] for each in stock.all(tables.model_days)) == money_of(stock, org_id) == 1_250_000


def test_a_model_without_a_price_is_unpriced_and_reported_once(stock: Stock):
    org_id, other = stock.org(), stock.org()
    _, [run] = admitted(stock, org_id)
    _, [of_other] = admitted(stock, other)

    first = store(stock, step_using(run, 1, use("house", None, input=5), use(input=1)))
    again = store(stock, step_using(run, 2, use("house", None, input=7)))
    elsewhere = store(stock, step_using(of_other, 1, use("house", None, input=7)))

    reported = [(each.org, each.provider, each.model) for each in first.unpriced]
    assert reported == [(stock.code(org_id), None, "house")]
    assert not again.unpriced and len(elsewhere.unpriced) == 1
    assert money_of(stock, org_id) == 250
    [day] = [each for each in stock.all(tables.model_days)
             if (each["org_id"], each["model"]) == (org_id, "house")]  # fmt: skip
    assert (day["provider"], day["units"], day["unpriced"], day["money"]) == ("", 12, 12, 0)
    assert {each["money"] for each in stock.all(tables.model_spends) if each["model"] == "house"} == {None}
    assert not [
        each for each in stock.all(tables.spends) if (each["org_id"], each["meter"]) == (other, MONEY)
    ]


def test_a_run_that_makes_up_models_is_reported_a_bounded_number_of_times(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    reported = 0
    for seq in range(1, 4):
        made_up = [use(f"made-up-{seq}-{number}", None, input=1) for number in range(30)]
        reported += len(store(stock, step_using(run, seq, *made_up)).unpriced)

    assert reported == prices.MAX_REPORTED


def test_absurd_amounts_fail_no_other_spend(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    absurd = [use("claude-opus-4-6", "anthropic", input=MAX_AMOUNT, output=MAX_AMOUNT) for _ in range(20)]

    for seq in range(1, 5):
        store(stock, step_using(run, seq, *absurd), step_using(run, seq + 10, use(input=1)))

    assert max(row["money"] for row in stock.all(tables.model_days)) <= 10**18
    assert used_of(stock, tables.model_spends.c.money) == 10**18
    assert max(row["money"] for row in stock.all(tables.model_spends)) == MAX_MONEY


def used_of(stock: Stock, column: Any) -> int:
    with stock.database.autocommit() as connection:
        return int(connection.execute(select(CappedSum(column))).scalar_one())


def test_a_sum_is_exact_beyond_what_a_float_holds(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    exact = Prices(own=[OwnPrice("m", {"request": Fraction(9_007_199) + Fraction(1, NANO)})])

    store(stock, step_using(run, 1, *(use("m", None, request=1) for _ in range(9))), by=exact)

    assert used_of(stock, tables.model_spends.c.money) == 9 * (9_007_199 * NANO + 1)


def test_the_rate_of_a_customer_is_that_of_its_org(stock: Stock):
    org_id, other = stock.org(), stock.org()
    own = Prices(
        PRICES.listed, [OwnPrice("*", factor=Fraction(2), org=stock.code(org_id))], per_usd=Fraction(1)
    )
    for each in (org_id, other):
        _, [run] = admitted(stock, each)
        store(stock, step_using(run, 1, use(input=1000)), by=own)

    assert (money_of(stock, org_id), money_of(stock, other)) == (500_000, 250_000)


def test_a_budget_of_money_stops_the_runs_that_use_it(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, MONEY, limit=NANO, per="month")
    add_budget(stock, org_id, MONEY, limit=NANO // 2, per="run", at_limit="fail", target="run")
    _, [run] = admitted(stock, org_id)
    million = use(input=1_000_000)

    store(stock, step_using(run, 1, million))
    assert not any(state.reached for state in states(stock, run).states)
    counted = store(stock, step_using(run, 2, million), step_using(run, 3, million))
    assert [state.reached for state in sorted(states(stock, run).states, key=lambda each: each.per)] == [
        False,
        True,
    ]
    assert not counted.warned
    warned = store(stock, step_using(run, 4, million)).warned

    assert used(stock, org_id, MONEY)[0] == NANO
    assert [(level.budget.per, level.used) for level in warned] == [("month", NANO)]
    assert all(state.reached for state in states(stock, run).states)


async def test_a_worker_loads_the_list_when_it_is_needed_and_a_newer_one_at_its_next_look(stock: Stock):
    org_id = stock.org()
    worker, [run] = admitted(stock, org_id)
    here = WorkerStore(stock.database, worker, timedelta(seconds=30), prices=Prices(per_usd=Fraction(1)))
    data = json.dumps([{
        "id": "openai", "name": "OpenAI", "api_pattern": "https://api\\.openai\\.com",
        "models": [{"id": "gpt-5-mini", "match": {"equals": "gpt-5-mini"}, "prices": {"input_mtok": 7}}],
    }]).encode()  # fmt: skip

    await here.spend(run, METER, 1, "1:1", use(input=1))
    with stock.database.transaction() as connection:
        prices.put_list(connection, data, models=1, at=stock.now(), actor="tester")
    await here.look_at_budgets()
    await here.spend(run, METER, 1, "1:2", use(input=1))
    await here.spend(run, METER, 1, "1:3", use(output=1))

    lines = {each["key"]: (each["money"], each["price_source"]) for each in stock.all(tables.model_spends)}
    assert lines["1:1"] == (250, PRICES.listed.version)
    assert lines["1:2"] == (7000, f"file of {stock.now():%Y-%m-%d}")
    assert lines["1:3"] == (None, None)


def test_the_currency_of_a_database_stays(stock: Stock):
    stock.within(prices.keep_currency, "EUR")
    stock.within(prices.keep_currency, "EUR")

    with pytest.raises(ConfigurationError, match="currency is USD, and the money in the database is EUR"):
        stock.within(prices.keep_currency, "USD")


MODELS = (
    ("openai", "gpt-5-mini"), ("openai", "gpt-5-nano"), ("anthropic", "claude-sonnet-4-5"),
    ("anthropic", "claude-haiku-4-5"), ("google", "gemini-2.5-pro"), ("openai", "gpt-5.6-sol"),
    ("mistral", "mistral-small-latest"), (None, "house-model"),
)  # fmt: skip
ORGS, SPENDS = 50, 10_000


@pytest.mark.timeout(900)
def test_the_invoice_is_the_sum_of_10_000_stored_spends(stock: Stock, clock: ManualClock):
    """Eight models, one without a price, 50 orgs, and a price that changes in the middle."""
    random_ = random.Random(34)
    clock.set(datetime(2026, 8, 20, 23, 0, tzinfo=UTC))
    runs = [run for _ in range(ORGS) for run in admitted(stock, stock.org())[1]]
    expected: Counter[OrgId] = Counter()
    seqs: Counter[RunId] = Counter()
    per_batch = 250
    for batch in range(SPENDS // per_batch):
        if batch == SPENDS // per_batch // 2:
            clock.set(datetime(2026, 8, 21, 0, 30, tzinfo=UTC))
        rows = []
        for run in random_.choices(runs, k=per_batch):
            provider, model = random_.choice(MODELS)
            kinds = {kind: random_.randrange(1, 9_000)
                     for kind in ("input", "cache_read", "output", "reasoning")}  # fmt: skip
            usage = use(model, provider, **kinds)
            seqs[run.id] += 1
            rows.append(step_using(run, seqs[run.id], usage))
            expected[run.org_id] += PRICES.price(usage, at=clock.now()).money or 0
        store(stock, *rows)

    stored, lines, days = Counter[OrgId](), Counter[OrgId](), Counter[OrgId]()
    for row in stock.all(tables.spends):
        if row["meter"] == MONEY:
            stored[row["org_id"]] += row["amount"]
    for row in stock.all(tables.model_spends):
        lines[row["org_id"]] += row["money"] or 0
    for row in stock.all(tables.model_days):
        days[row["org_id"]] += row["money"]
    assert stored == lines == days == expected
    of_sol = {row["price_since"] for row in stock.all(tables.model_spends) if row["model"] == "gpt-5.6-sol"}
    assert of_sol == {None, date(2026, 8, 21)}
    unpriced = sum(row["unpriced"] for row in stock.all(tables.model_days))
    assert unpriced == sum(
        row["units"] for row in stock.all(tables.model_days) if row["model"] == "house-model"
    )
