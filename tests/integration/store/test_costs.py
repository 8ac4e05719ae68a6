"""Costs by org, model, definition and month: their sums are those of the stored spends; and forecasts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from tests.integration.store.test_prices import METER, money_of, step_using, store, use
from tests.integration.store.test_spending import add_budget, admitted
from worker.diagnosis.matters import matters
from worker.errors import UsageError
from worker.ids import ALL_ORGS
from worker.model.definitions.budgets import MONEY, period_of, reaches_at
from worker.model.money import NANO
from worker.model.prices import OwnPrice, Prices
from worker.operations.budgets import raise_budget
from worker.store import prices
from worker.store.lists import usage
from worker.store.lists.costs import columns_of_costs, costs, parts_of


def test_a_line_an_org_is_the_sum_of_its_stored_spends(stock: Stock, clock: ManualClock):
    clock.set(datetime(2026, 11, 30, 23, 0, tzinfo=UTC))
    orgs = [stock.org(), stock.org()]
    runs = [admitted(stock, org_id)[1][0] for org_id in orgs]
    store(stock, step_using(runs[0], 1, use(input=1001, cache_read=1, web_search=2)))
    clock.set(datetime(2026, 12, 1, 1, 0, tzinfo=UTC))
    store(
        stock, step_using(runs[0], 2, use("gpt-5-nano", output=3, reasoning=7), use("house", None, input=4))
    )
    store(stock, step_using(runs[1], 1, use(input=5)))

    by_org = stock.reading(costs, ALL_ORGS, "org")
    parts = stock.reading(costs, ALL_ORGS, "org,model,definition,month,kind,tariff,provider")
    months = stock.reading(costs, stock.code(orgs[0]), "month")

    money = {stock.code(org_id): money_of(stock, org_id) for org_id in orgs}
    assert [(row["org"], row["money"]) for row in by_org] == list(money.items())
    assert sum(row["money"] for row in parts) == sum(money.values())
    first = by_org[0]
    assert (first["tokens"], first["calls"], first["unpriced"]) == (1016, 2, 4)
    assert (first["amount"], first["currency"]) == ("0.020254275", "USD")
    assert [(row["month"], row["money"]) for row in months] == [("2026-12", 4000), ("2026-11", 20_250_275)]
    house = next(row for row in parts if row["model"] == "house")
    assert (house["money"], house["unpriced"], house["provider"]) == (0, 4, None)


def test_parts_are_named():
    assert parts_of(" model, org ") == ("org", "model")
    assert columns_of_costs(parts_of("org"))[:2] == ("org", "tokens")
    with pytest.raises(UsageError, match="'week' is not a way"):
        parts_of("org,week")


def test_a_page_of_costs_has_the_rows_of_some_orgs(stock: Stock):
    codes = []
    for _ in range(3):
        org_id = stock.org()
        codes.append(stock.code(org_id))
        store(stock, step_using(admitted(stock, org_id)[1][0], 1, use(input=5)))

    first = stock.reading(costs, ALL_ORGS, "org", limit=2)
    rest = stock.reading(costs, ALL_ORGS, "org", limit=2, after=codes[1])

    assert [row["org"] for row in first + rest] == codes


def test_a_pace_is_foretold_after_a_tenth_of_the_period():
    from zoneinfo import ZoneInfo

    month = period_of("month", ZoneInfo("UTC"), datetime(2026, 12, 1, tzinfo=UTC))

    def at(day: int, used: int) -> datetime | None:
        return reaches_at(month, used, 20 * NANO, datetime(2026, 12, day, tzinfo=UTC))

    assert at(2, 10 * NANO) is None
    assert at(11, 10 * NANO) == datetime(2026, 12, 21, tzinfo=UTC)
    assert at(11, 6 * NANO) is None
    assert at(11, 20 * NANO) is None and at(11, 0) is None
    assert at(11, 1) is None
    assert reaches_at(month, 10**18 - 1, 10**18, datetime(2026, 12, 31, tzinfo=UTC)) is not None


def test_a_forecast_is_reported_and_a_matter_of_the_morning(stock: Stock, clock: ManualClock):
    clock.set(datetime(2026, 12, 11, tzinfo=UTC))
    org_id = stock.org()
    add_budget(stock, org_id, MONEY, limit=NANO, per="month")
    _, [run] = admitted(stock, org_id)
    by = Prices(own=[OwnPrice("m", {"input": Fraction(100_000)})])  # 0.1 a token

    quiet = store(stock, step_using(run, 1, use("m", None, input=3)), by=by)
    ahead = store(stock, step_using(run, 2, use("m", None, input=2)), by=by)
    again = store(stock, step_using(run, 3, use("m", None, input=1)), by=by)

    assert (list(quiet.ahead), list(again.ahead)) == ([], [])
    [(level, at)] = ahead.ahead
    assert (level.used, at) == (NANO // 2, datetime(2026, 12, 21, tzinfo=UTC))
    [row] = stock.reading(usage.forecasts, ALL_ORGS, limit=5)
    text = usage.forecast_text(row, "USD")
    assert text == f"at this pace {stock.code(org_id)} reaches 1.00 USD of money per month on 2026-12-17"
    stock.within(prices.keep_currency, "USD")
    with stock.database.autocommit() as connection:
        found = [one for one in matters(connection, clock.now(), installation="") if one.kind == "forecast"]
    assert [one.step.command for one in found] == [f"budgets list --org {stock.code(org_id)}"]
    assert found[0].about == f"A{text[1:]}."


def test_a_budget_of_money_is_raised_in_its_currency(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, MONEY, limit=NANO, per="month")
    code = stock.code(org_id)

    row = raise_budget(stock.database, code, MONEY, by="0.50 USD", per="month", actor="ann")

    assert (row["amount"], row["limit"]) == (NANO // 2, NANO * 3 // 2)
    for wrong in (5, "5", "0 USD", "5 EURO"):
        with pytest.raises(UsageError, match="money|0"):
            raise_budget(stock.database, code, MONEY, by=wrong, per="month", actor="ann")


def test_the_limit_of_a_property_may_have_decimals(stock: Stock, clock: ManualClock):
    from worker.guard.claims import Claims
    from worker.store import budgets

    org_id = stock.org()
    add_budget(stock, org_id, MONEY, limit=None, per="month", property="monthly_usd")
    add_budget(stock, org_id, METER, limit=None, per="day", property="monthly_usd", target="tokens")
    properties, at = {"monthly_usd": "19.99"}, stock.now()
    claims = Claims("org_1", "client", frozenset(), properties, {}, at, at + timedelta(hours=1))
    names = stock.reading(budgets.watched, ALL_ORGS).properties

    stock.within(budgets.store_properties, org_id, claims, names)

    with stock.database.autocommit() as connection:
        found = budgets.of_orgs(connection, [org_id], None, stock.now())[org_id]
    assert {budget.meter: budget.limit for budget in found} == {MONEY: 19_990_000_000, METER: None}
