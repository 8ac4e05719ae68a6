"""What the requests of batches cost: reserved, then what the results say at the batch tariff, each once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest

from tests.fakes.batches import ANTHROPIC, Rig
from tests.integration.batches.test_batches import body_for
from tests.integration.store.test_children import CAP, pages
from tests.integration.store.test_spending import add_budget, used
from worker.demo.model_apis import ModelApis
from worker.features.batches.remote import Line
from worker.ids import RunId
from worker.model.definitions.budgets import MONEY
from worker.model.money import NANO
from worker.model.price_list import GenaiPrices
from worker.model.prices import Prices
from worker.model.runs.budgets import decisive, wait_of
from worker.model.runs.run import AdmittedRun
from worker.store import batch_requests, budgets, children, spending, tables
from worker.store.worker_store import WorkerStore

pytestmark = pytest.mark.anyio
PRICES = Prices(GenaiPrices.released(), per_usd=Fraction(1))
# 100 tokens of input and 20 of output of gpt-5-mini: 0.25 and 2 USD for a million, the half of it in a batch.
RESULT = (100 * 250 + 20 * 2000) // 2


@pytest.fixture
def priced(rig: Rig) -> Rig:
    rig.prices = PRICES
    return rig


def lines(rig: Rig) -> list[tuple[str, int, int | None, int]]:
    """Kind, units, money and place of what is stored of models, all at the batch tariff."""
    rows = rig.stock.all(tables.model_spends)
    assert {row["tariff"] for row in rows} <= {"batch"}
    return sorted((row["kind"], row["units"], row["money"], row["place"]) for row in rows)


def by_day(rig: Rig, meter: str) -> int:
    return sum(row["used"] for row in rig.stock.all(tables.meter_days) if row["meter"] == meter)


def priced_days(rig: Rig) -> int:
    return sum(row["money"] for row in rig.stock.all(tables.model_days))


async def test_a_result_costs_the_half_and_counts_once(priced: Rig) -> None:
    rig, sender, run = priced, priced.sender(), priced.running()
    await rig.ask(sender, run)
    rig.park(run)
    assert (rig.spent(run, MONEY), lines(rig)) == (0, [])

    await rig.pass_time(sender, 45)

    assert lines(rig) == [("input", 100, 12_500, 0), ("output", 20, 20_000, 0)]
    assert rig.spent(run, MONEY) == by_day(rig, MONEY) == priced_days(rig) == RESULT
    assert [(each.used.tariff, each.priced.money) for one in rig.reported for each in one.costed] == [
        ("batch", RESULT)
    ]


async def test_a_budget_of_money_reserves_what_a_request_costs_at_most(priced: Rig) -> None:
    rig, sender, run = priced, priced.sender(), priced.running()
    add_budget(rig.stock, run.org_id, MONEY, limit=NANO, per="month")
    body = {"model": "gpt-5-mini", "input": "x" * 2400, "max_output_tokens": 500}
    await rig.ask(sender, run, body)
    rig.park(run)
    reserved = rig.spent(run, MONEY)
    assert 500 * 1000 + 800 * 125 < reserved < 500 * 1000 + 1000 * 125
    assert used(rig.stock, run.org_id, MONEY) == [reserved]

    await rig.pass_time(sender, 45)

    assert rig.spent(run, MONEY) == by_day(rig, MONEY) == priced_days(rig) == RESULT
    assert used(rig.stock, run.org_id, MONEY) == [RESULT]


async def test_what_is_reserved_warns_and_is_freed_by_a_request_that_is_sent_on_its_own(
    priced: Rig, apis: ModelApis
) -> None:
    apis.reply = lambda body: 500
    rig, sender, run = priced, priced.sender(), priced.running()
    add_budget(rig.stock, run.org_id, MONEY, limit=500_000, per="month")
    await rig.ask(sender, run, {"model": "gpt-5-mini", "input": "x", "max_output_tokens": 500})
    rig.park(run)
    assert [level.budget.meter for one in rig.reported for level in one.warned] == [MONEY]

    await rig.pass_time(sender, 45)

    assert [row["reason"] for row in rig.items()] == ["failed"]
    assert (rig.spent(run, MONEY), used(rig.stock, run.org_id, MONEY), lines(rig)) == (0, [0], [])


class Held:
    """Holds up a function of the store just before its transaction ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._done, self._go_on = threading.Event(), threading.Event()
        work = getattr(batch_requests, name)

        def late(*given: Any) -> Any:
            found = work(*given)
            self._done.set()
            self._go_on.wait(5)
            return found

        monkeypatch.setattr(batch_requests, name, late)

    async def cancels(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task whose transaction is held up, which ends then."""
        await asyncio.to_thread(self._done.wait, 5)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, self._go_on.set)
        await asyncio.wait({task})


async def test_what_is_reserved_warns_although_the_process_of_the_run_has_ended(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored, and it alone passes the warning: nothing else reports that in this period."""
    sender, run, held = rig.sender(), rig.running(), Held(monkeypatch, "open_item")
    add_budget(rig.stock, run.org_id, limit=1000)
    inflight = rig.inflight(run)
    monkeypatch.setattr(rig, "inflight", lambda run: inflight)

    await held.cancels(asyncio.create_task(rig.ask(sender, run)))
    await inflight.stored()

    assert used(rig.stock, run.org_id) > [1000]
    assert [level.budget.meter for one in rig.reported for level in one.warned] == ["llm_tokens"]


async def test_a_result_is_reported_although_its_worker_drains(
    priced: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, sender, run = priced, priced.sender(), priced.running()
    add_budget(rig.stock, run.org_id, MONEY, limit=RESULT, per="month")
    await rig.ask(sender, run, {"model": "house", "input": "x"})
    rig.park(run)
    await rig.pass_time(sender, 12)
    rig.clock.advance(timedelta(minutes=30))
    rig.reported.clear()
    held = Held(monkeypatch, "store_results")

    await held.cancels(asyncio.create_task(rig.look(sender)))

    assert [each.model for one in rig.reported for each in one.unpriced] == ["house"]
    assert [row["state"] for row in rig.items()] == ["done"]


@pytest.mark.parametrize("own", [None, "fail", "ask"])
async def test_a_run_that_waits_for_what_others_have_reserved_goes_on_once_that_is_settled(
    rig: Rig, own: str | None
) -> None:
    """Also where a budget of each run, which it has not reached, would fail it or ask."""
    org = rig.stock.org(limit=10_000)
    add_budget(rig.stock, org, limit=4000)
    if own is not None:
        add_budget(rig.stock, org, limit=9000, per="run", at_limit=own)
    sender, definition = rig.sender(), rig.stock.definition(org)
    first, second = (rig.stock.running(rig.worker, org, definition) for _ in range(2))
    await rig.ask(sender, first)
    rig.park(first)
    await wait_for_budget(rig, second)
    await rig.pass_time(sender, 12)
    assert used(rig.stock, org) > [4000] and rig.live(second) == "parked"

    await rig.pass_time(sender, 40)

    assert used(rig.stock, org) == [120]
    assert [rig.live(run) for run in (first, second)] == ["waiting"] * 2


async def test_a_settlement_keeps_those_waiting_whose_budget_is_reached_nevertheless(rig: Rig) -> None:
    org = rig.stock.org(limit=10_000)
    add_budget(rig.stock, org, limit=100)
    sender, definition = rig.sender(), rig.stock.definition(org)
    first, second = (rig.stock.running(rig.worker, org, definition) for _ in range(2))
    await rig.ask(sender, first)
    rig.park(first)
    await wait_for_budget(rig, second)

    await rig.pass_time(sender, 45)

    assert used(rig.stock, org) == [120]
    assert [rig.live(run) for run in (first, second)] == ["waiting", "parked"]


async def test_a_settlement_keeps_a_run_waiting_that_asks_for_its_own_budget(rig: Rig) -> None:
    """It would ask again."""
    org = rig.stock.org(limit=10_000)
    add_budget(rig.stock, org, limit=100_000)
    add_budget(rig.stock, org, limit=100, per="run", at_limit="ask")
    sender, definition = rig.sender(), rig.stock.definition(org)
    first, second = (rig.stock.running(rig.worker, org, definition) for _ in range(2))
    await rig.ask(sender, first)
    rig.park(first)
    rig.stock.within(spending.spend, second, "llm_tokens", 100, "1:1")
    await wait_for_budget(rig, second)

    await rig.pass_time(sender, 45)

    assert [rig.live(run) for run in (first, second)] == ["waiting", "parked"]


async def wait_for_budget(rig: Rig, run: AdmittedRun) -> None:
    """Park a run for the budget that stops it."""
    store = WorkerStore(rig.stock.database, rig.worker, timedelta(days=30))
    state = decisive((await store.budgets_of(run)).states)
    assert state is not None
    waited = await store.open_wait(run, wait_of(state, 1, rig.stock.now()))
    assert waited is not None and waited.state == "pending"
    rig.stock.finish(rig.worker, rig.stock.ended(run, "parked", outcome="parked", reason="budget"))


async def test_a_model_without_a_price_is_unpriced(priced: Rig) -> None:
    rig, sender, run = priced, priced.sender(), priced.running()
    add_budget(rig.stock, run.org_id, MONEY, limit=NANO, per="month")
    await rig.ask(sender, run, {"model": "house", "input": "x"})
    rig.park(run)
    await rig.pass_time(sender, 45)

    assert lines(rig) == [("input", 100, None, 0), ("output", 20, None, 0)]
    assert [each.model for one in rig.reported for each in one.unpriced] == ["house"]
    assert (rig.spent(run, MONEY), rig.spent(run)) == (0, 120)


async def test_a_late_result_is_charged(priced: Rig, apis: ModelApis) -> None:
    apis.takes = lambda: 120 * 60.0
    priced.definition = {"batch_within": timedelta(minutes=60)}
    rig, sender, run = priced, priced.sender(), priced.running()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 61)
    assert rig.spent(run, MONEY) == rig.spent(run) == 0

    await rig.pass_time(sender, 90)

    assert [row["state"] for row in rig.items()] == ["sync"]
    assert (rig.spent(run, MONEY), priced_days(rig)) == (RESULT, RESULT)


async def test_what_was_paid_twice_is_two_uses(priced: Rig, apis: ModelApis) -> None:
    apis.lose_requests["POST /v1/messages/batches"] = 1
    rig, sender, run = priced, priced.sender(), priced.running()
    body = body_for(ANTHROPIC, "hello") | {"model": "claude-sonnet-4-5"}
    await rig.ask(sender, run, body, api=ANTHROPIC)
    rig.park(run)
    await rig.pass_time(sender, 14)
    api = await sender.accounts.open("anthropic", None)
    assert api is not None
    again = [Line(rig.items()[0]["id"], b'{"model": "claude-sonnet-4-5", "messages": []}')]
    await api.create("/v1/messages", "", None, again)
    await rig.pass_time(sender, 60)

    # 3 and 15 USD for a million, the half of it in a batch.
    once = (100 * 3000 + 20 * 15_000) // 2
    assert {place for *_, place in lines(rig)} == {0, 1}
    assert rig.spent(run, MONEY) == priced_days(rig) == 2 * once
    assert rig.spent(run) == 240


async def test_the_reservation_of_a_child_counts_for_its_tree_until_it_is_settled(priced: Rig) -> None:
    rig, sender, parent = priced, priced.sender(), priced.running()
    add_budget(rig.stock, parent.org_id, MONEY, limit=NANO, per="run")
    options = {"cap": CAP, "keep": False, "isolations": {CAP.handler: "child"}}
    rig.stock.within(children.start, parent, pages(1), **options)
    [child] = rig.stock.admit(rig.worker)
    assert child.origin == "child"
    await rig.ask(sender, child)
    rig.park(child)

    def of_tree(meter: str) -> int:
        return rig.stock.reading(budgets.spent_in_tree, RunId(parent.id), meter)

    assert of_tree("llm_tokens") == rig.spent(child) > 1000 and of_tree(MONEY) > RESULT

    await rig.pass_time(sender, 45)

    assert (of_tree("llm_tokens"), of_tree(MONEY)) == (120, RESULT)
    assert below(rig) == {"llm_tokens": 120, MONEY: RESULT}


def below(rig: Rig) -> dict[str, int]:
    return {row["meter"]: row["used"] for row in rig.stock.all(tables.tree_spends)}


async def test_a_retry_has_spent_what_its_steps_in_batches_have(priced: Rig) -> None:
    rig, sender, run = priced, priced.sender(), priced.running()
    await rig.ask(sender, run)
    await rig.pass_time(sender, 45)
    await rig.ask(sender, run, step="second")
    rig.stock.finish(rig.worker, rig.stock.ended(run, "failed"))
    retry = rig.stock.running(rig.worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")

    rig.stock.within(spending.copy, run.org_id, run.id, retry.id)

    assert (rig.spent(retry), rig.spent(retry, MONEY)) == (120, RESULT)


def test_a_settlement_lowers_every_sum_and_changes_no_other_period(rig: Rig) -> None:
    """Also below 0 for a counter that holds nothing else: reservations of a day that is over."""
    run = rig.running()
    add_budget(rig.stock, run.org_id, "llm_tokens", limit=10_000, per="day")
    of_run = run.id, run.org_id, run.definition_id

    def spends(amounts: Iterable[int]) -> list[spending.Spend]:
        return [spending.Spend(*of_run, "llm_tokens", f"k{n}", each) for n, each in enumerate(amounts)]

    rig.stock.within(spending.record, spends([500, 700]), rig.stock.now())
    rig.stock.within(spending.settle, spends([100]))
    assert used(rig.stock, run.org_id, "llm_tokens") == [800] and by_day(rig, "llm_tokens") == 800
    rig.clock.advance(timedelta(days=1))
    rig.stock.within(spending.record, [spending.Spend(*of_run, "llm_tokens", "k2", 5)], rig.stock.now())
    rig.stock.within(spending.settle, spends([100, 0, 5]))

    assert sorted(row["used"] for row in rig.stock.all(tables.meters)) == [5, 800]
    assert by_day(rig, "llm_tokens") == 105


def test_a_settlement_counts_once_where_two_budgets_limit_the_same(rig: Rig) -> None:
    run = rig.running()
    add_budget(rig.stock, run.org_id, "llm_tokens", limit=10_000, per="day")
    add_budget(rig.stock, None, "llm_tokens", limit=20_000, per="day")
    spend = spending.Spend(run.id, run.org_id, run.definition_id, "llm_tokens", "k", 700)

    rig.stock.within(spending.record, [spend], rig.stock.now())
    rig.stock.within(spending.settle, [replace(spend, amount=100)])

    assert [row["used"] for row in rig.stock.all(tables.meters)] == [100]


def test_a_settlement_reaches_the_day_of_its_reservation_after_the_clock_went_back(rig: Rig) -> None:
    """The day before has counted it, too: it began with all that was spent since its start."""
    run = rig.running()
    add_budget(rig.stock, run.org_id, "llm_tokens", limit=10_000, per="day")
    spend = spending.Spend(run.id, run.org_id, run.definition_id, "llm_tokens", "k", 700)
    rig.stock.within(spending.record, [spend], rig.stock.now())

    rig.clock.advance(-timedelta(days=1))
    rig.stock.within(spending.record, [replace(spend, key="k2", amount=5)], rig.stock.now())
    rig.stock.within(spending.settle, [replace(spend, amount=100)])
    rig.clock.advance(timedelta(days=1))

    assert used(rig.stock, run.org_id, "llm_tokens") == [100]
    assert sorted(row["used"] for row in rig.stock.all(tables.meters)) == [100, 105]
