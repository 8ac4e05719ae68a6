"""What runs spend counts once, fenced; budgets of runs and run_seconds hold admission exactly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.exc import DBAPIError

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock
from worker.engine.attempt.answers import Running, answer
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.tools import StoreActs
from worker.engine.runners.contract import StopSignal
from worker.errors import StoreUnavailable
from worker.guard.claims import Claims
from worker.handlers.calls import CountSpend
from worker.ids import ALL_ORGS, OrgId, RunId, WorkerId, new_id
from worker.model.definitions.budgets import MAX_AMOUNT, MAX_SUM
from worker.model.runs.budgets import wait_of
from worker.model.runs.outcome import Trail
from worker.model.runs.run import AdmittedRun, NewStep, RunStep
from worker.model.runs.waits import NewWait, WaitKind
from worker.operations import budgets as operations_budgets
from worker.operations.runs import cancel
from worker.store import budgets, spending, tables
from worker.store.database import Database
from worker.store.lists import usage
from worker.store.spending import Spend
from worker.store.sql import statements
from worker.store.worker_store import WorkerStore
from worker.telemetry.events import Emitted

METER = "llm_tokens"


def add_budget(
    stock: Stock, org_id: OrgId | None, meter: str = METER, limit: int | None = 100, **values
) -> str:
    budget_id, at = new_id(), stock.now()
    row = {
        "id": budget_id,
        "target": f"org:{org_id or 'all'}",
        "org_id": org_id,
        "selector": "all" if org_id is None else None,
        "meter": meter,
        "limit": limit,
        "per": "day",
        "at_limit": "wait",
        "warn_at": 0.8,
        "created_at": at,
        "updated_at": at,
        "updated_by": "tester",
    }
    with stock.database.transaction() as connection:
        connection.execute(insert(tables.budgets).values(**row | values))
    return budget_id


def admitted(stock: Stock, org_id: OrgId, count: int = 1) -> tuple[WorkerId, list[AdmittedRun]]:
    worker = stock.worker()
    stock.put(*stock.runs([org_id] * count))
    return worker, stock.admit(worker)


def spend(stock: Stock, run: AdmittedRun, amount: int, key: str = "1:1", meter: str = METER):
    """As a worker records it: fenced, in one transaction."""
    with stock.database.transaction() as connection:
        if not spending.lock_running(connection, {run.id: run.fencing_token}):
            return None
        given = Spend(run.id, run.org_id, run.definition_id, meter, key, amount)
        return spending.record(connection, [given], stock.database.now(connection))


def levels(stock: Stock, org_id: OrgId, meter: str = METER) -> list[budgets.Level]:
    with stock.database.autocommit() as connection:
        found = budgets.of_orgs(connection, [org_id], [meter], stock.database.now(connection))
        return budgets.levels(connection, found.get(org_id, []))


def used(stock: Stock, org_id: OrgId, meter: str = METER) -> list[int]:
    return [level.used for level in levels(stock, org_id, meter)]


async def test_a_budget_that_is_raised_before_the_wait_for_it_is_stored_keeps_no_run(stock: Stock):
    """The run looks, the budget is raised, the wait is stored: whoever raised it has found no wait."""
    org_id = stock.org()
    add_budget(stock, org_id)
    worker, runs = admitted(stock, org_id, count=2)
    store = WorkerStore(stock.database, worker, timedelta(seconds=30))
    spend(stock, runs[0], 100)
    [seen] = (await store.budgets_of(runs[0])).states
    wait = wait_of(seen, 1, stock.now())
    with stock.database.transaction() as connection:
        now = stock.database.now(connection)
        until = now + timedelta(hours=1)
        raised = {"meter": METER, "per": "day", "amount": 50, "until": until, "actor": "kim", "at": now}
        budgets.raise_limit(connection, org_id, **raised)
        budgets.wake(connection, [org_id], now)

    state = await store.open_wait(runs[0], wait)

    assert state is not None and state.state == "over"
    # The control: the statement alone lets the run wait until the period ends.
    alone = stock.hot("open_wait", runs[1].id, runs[1].fencing_token, attempt=1, wait=wait)
    assert alone is not None and alone.state == "pending"


async def test_a_wait_for_a_budget_that_stops_the_run_is_kept(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id)
    worker, [run] = admitted(stock, org_id)
    store = WorkerStore(stock.database, worker, timedelta(seconds=30))
    spend(stock, run, 100)
    [seen] = (await store.budgets_of(run)).states

    state = await store.open_wait(run, wait_of(seen, 1, stock.now()))

    assert state is not None and state.state == "pending"


def test_a_spend_counts_once_by_its_key(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id)
    _, [run] = admitted(stock, org_id)

    spend(stock, run, 30)
    spend(stock, run, 30)
    spend(stock, run, 5, key="1:2")

    [level] = levels(stock, org_id)
    assert (level.used, level.left, level.reached) == (35, 65, False)
    [day] = stock.all(tables.meter_days)
    assert (day["org_id"], day["definition_id"], day["used"]) == (org_id, run.definition_id, 35)
    assert sum(row["amount"] for row in stock.all(tables.spends)) == 35


def test_a_spend_of_a_run_that_is_no_longer_ours_does_not_count(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id)
    _, [run] = admitted(stock, org_id)
    stock.change(tables.live_runs, run.id, fencing_token=run.fencing_token + 1)

    assert spend(stock, run, 30) is None
    assert (stock.all(tables.spends), used(stock, org_id)) == ([], [0])


def test_the_spend_that_crosses_the_limit_is_counted(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id)
    _, [run] = admitted(stock, org_id)

    first = spend(stock, run, 79)
    assert [level.reached for level in levels(stock, org_id)] == [False]
    second = spend(stock, run, 40, key="1:2")

    assert [(level.used, level.left, level.reached) for level in levels(stock, org_id)] == [(119, 0, True)]
    assert (len(first.warned), len(second.warned)) == (0, 1)
    assert not spend(stock, run, 1, key="1:3").warned


def test_a_new_day_begins_with_nothing_used(stock: Stock, clock: ManualClock):
    org_id = stock.org()
    add_budget(stock, org_id, zone="Pacific/Auckland")
    add_budget(stock, org_id, per="month", limit=1000)
    _, [run] = admitted(stock, org_id)
    spend(stock, run, 30)

    assert used(stock, org_id) == [30, 30]


def test_a_budget_that_is_new_counts_what_its_period_has_spent_already(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    spend(stock, run, 30)
    add_budget(stock, org_id)

    assert used(stock, org_id) == [30]
    spend(stock, run, 12, key="1:2")
    assert used(stock, org_id) == [42]


def test_a_budget_per_run_counts_the_run_alone(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, per="run", at_limit="fail")
    _, runs = admitted(stock, org_id, 2)
    for run in runs:
        spend(stock, run, 30)

    with stock.database.autocommit() as connection:
        found = budgets.of_orgs(connection, [org_id], [METER], stock.now())[org_id]
        [level] = budgets.levels(connection, found, runs[0].id)
    assert level.used == 30


def test_raises_add_to_the_limit_until_they_end(stock: Stock):
    org_id, other = stock.org(), stock.org()
    add_budget(stock, org_id)
    add_budget(stock, other)
    with stock.database.transaction() as connection:
        now = stock.database.now(connection)
        for until in (timedelta(hours=1), timedelta(seconds=-1)):
            budgets.raise_limit(
                connection,
                org_id,
                meter=METER,
                per="day",
                amount=50,
                until=now + until,
                actor="tester",
                at=now,
            )
        found = budgets.of_orgs(connection, [org_id, other], None, now)

    assert [found[each][0].limit for each in (org_id, other)] == [150, 100]


def test_a_selector_gives_each_org_its_own_meter(stock: Stock):
    one, other = stock.org(), stock.org()
    add_budget(stock, None)
    _, runs = admitted(stock, one)
    spend(stock, runs[0], 30)

    assert (used(stock, one), used(stock, other)) == ([30], [0])


# --- runs and run_seconds ---


def store_of(stock: Stock, worker: WorkerId) -> WorkerStore:
    store = WorkerStore(stock.database, worker, timedelta(seconds=30))
    asyncio.run(store.look_at_budgets())
    return store


def admit(store: WorkerStore, free: int = 100) -> Sequence[AdmittedRun]:
    return asyncio.run(store.admit({HANDLER: None}, {"child": free, "inline": 0}))


def test_a_budget_of_runs_holds_the_others_without_stopping_any(stock: Stock):
    org_id, free_org = stock.org(limit=100), stock.org(limit=100)
    add_budget(stock, org_id, "runs", 3)
    runs = [stock.run(org_id, start_by=stock.now() + timedelta(hours=1)) for _ in range(5)]
    stock.put(*runs, stock.run(free_org))
    store = store_of(stock, stock.worker())

    starting = admit(store)

    assert [run.org_id for run in starting].count(org_id) == 3
    assert [run.org_id for run in starting].count(free_org) == 1
    held = [row for row in stock.all(tables.live_runs) if row["state"] == "waiting"]
    assert [(row["reason"], row["detail"], row["attempt"], row["start_by"]) for row in held] == [
        ("budget", "runs per day", 0, None)
    ] * 2
    assert admit(store) == []
    assert used(stock, org_id, "runs") == [3]


def test_a_run_that_is_cancelled_as_a_budget_holds_it_back_does_not_wait_for_it(stock: Stock):
    """It was running when it was asked to stop, and the budget may keep it waiting for weeks."""
    org_id = stock.org()
    add_budget(stock, org_id, "runs", 1)
    definition = stock.definition(org_id)
    stock.put(*(stock.run(org_id, definition) for _ in range(2)))
    [one, two] = stock.admit(stock.worker())
    cancel(stock.database, two.id, actor="ada")

    starting, _ = stock.within(spending.hold_back, [one, two])

    assert starting == [one]
    assert (stock.stored(two.id)["state"], stock.stored(two.id)["reason"]) == ("cancelled", "requested")
    assert used(stock, org_id, "runs") == [1]


def test_a_run_is_counted_at_its_first_admission_only(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, "runs", 1)
    worker = stock.worker()
    store = store_of(stock, worker)
    stock.put(stock.run(org_id))
    [run] = admit(store)
    stock.finish(worker, stock.ended(run, "waiting"))
    stock.make_available(run.id)

    [again] = admit(store)

    assert (again.id, again.attempt, used(stock, org_id, "runs")) == (run.id, 2, [1])


def test_a_raise_lets_held_runs_start(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, "runs", 1)
    stock.put(stock.run(org_id), stock.run(org_id))
    store = store_of(stock, stock.worker())
    assert len(admit(store)) == 1
    with stock.database.transaction() as connection:
        now = stock.database.now(connection)
        budgets.raise_limit(
            connection,
            org_id,
            meter="runs",
            per="day",
            amount=1,
            until=now + timedelta(hours=1),
            actor="tester",
            at=now,
        )
        budgets.wake(connection, [org_id], now)

    assert len(admit(store)) == 1


def test_the_time_of_handlers_holds_admission_once_it_is_used_up(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, "run_seconds", 3)
    worker = stock.worker()
    store = store_of(stock, worker)
    for expected in ([2], [4]):
        stock.put(stock.run(org_id))
        [run] = admit(store)
        ended = stock.ended(run)
        assert asyncio.run(store.finish([ended])) == {run.id}
        assert asyncio.run(store.finish([ended])) == {run.id}
        assert used(stock, org_id, "run_seconds") == expected
    stock.put(stock.run(org_id))

    assert admit(store) == []


def test_two_workers_admit_no_more_runs_than_the_budget_has(postgres: Database):
    stock = Stock(postgres)
    org_id = stock.org(limit=1000)
    add_budget(stock, org_id, "runs", 40)
    stock.put(*stock.runs([org_id] * 100))
    stores = [store_of(stock, stock.worker()) for _ in range(3)]

    async def all_admit() -> list[Sequence[AdmittedRun]]:
        free = {"child": 20, "inline": 0}
        return await asyncio.gather(
            *(store.admit({HANDLER: None}, free) for _ in range(3) for store in stores)  # type: ignore[arg-type]
        )

    starting = [run for part in asyncio.run(all_admit()) for run in part]

    assert len(starting) == len({run.id for run in starting}) == 40
    assert used(stock, org_id, "runs") == [40]


def test_admission_reads_no_budget_of_an_org_that_has_none(stock: Stock, monkeypatch: pytest.MonkeyPatch):
    org_id, other = stock.org(), stock.org()
    add_budget(stock, other, "runs", 1)
    stock.put(stock.run(org_id))
    store = store_of(stock, stock.worker())
    monkeypatch.setattr(spending, "hold_back", None)

    assert len(admit(store)) == 1


def test_old_counters_and_raises_are_deleted(stock: Stock):
    org_id, now = stock.org(), stock.now()
    old = now - timedelta(days=41)
    with stock.database.transaction() as connection:
        for start in (old, now):
            row = {"org_id": org_id, "meter": METER, "per": "day", "starts_at": start, "used": 1}
            connection.execute(insert(tables.meters).values(**row))
            budgets.raise_limit(
                connection, org_id, meter=METER, per="day", amount=1, until=start, actor="tester", at=start
            )

        assert budgets.forget_counters(connection) == 1

    assert [row["starts_at"] for row in stock.all(tables.meters)] == [now]
    assert [row["until"] for row in stock.all(tables.budget_raises)] == [now]


# --- budgets that runs check ---


def step_of(run: AdmittedRun, seq: int, *spends: tuple[str, int]) -> RunStep:
    at = run.started_at
    step = NewStep("ask", None, seq, seq, '"hi"', at, at, spends)
    return RunStep(run, HANDLER, step, 4)


def store_steps(stock: Stock, *rows: RunStep) -> set[tuple[str, int]]:
    return stock.within(spending.store_steps, rows)[0]


def states(stock: Stock, run: AdmittedRun) -> spending.RunBudgets:
    return stock.reading(spending.states_of, run)


def test_the_spends_of_a_step_count_with_it_once_and_only_while_the_run_is_ours(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id)
    _, [run, other] = admitted(stock, org_id, 2)
    row = step_of(run, 1, (METER, 20), (METER, 5), ("calls", 1))

    assert store_steps(stock, row, step_of(other, 1, (METER, 1))) == {
        (run.id, run.fencing_token),
        (other.id, other.fencing_token),
    }
    store_steps(stock, row)
    stock.change(tables.live_runs, run.id, fencing_token=run.fencing_token + 1)
    store_steps(stock, step_of(run, 2, (METER, 50)))

    assert used(stock, org_id) == [26]
    keys = sorted((row["meter"], row["key"], row["amount"]) for row in stock.all(tables.spends))
    assert keys == [("calls", "step:1", 1), (METER, "step:1", 1), (METER, "step:1", 25)]
    assert len(stock.all(tables.steps)) == 2


def test_a_run_uses_a_meter_once_its_definition_has_spent_of_it(stock: Stock):
    org_id = stock.org()
    definition_id = stock.definition(org_id)
    add_budget(stock, org_id, limit=10)
    worker = stock.worker()
    stock.put(*(stock.run(org_id, definition_id) for _ in range(2)), stock.run(org_id))
    runs = stock.admit(worker)
    first, second = (run for run in runs if run.definition_id == definition_id)
    [stranger] = (run for run in runs if run.definition_id != definition_id)

    assert [state.uses for state in states(stock, first).states] == [False]
    spend(stock, first, 10)

    assert [(state.uses, state.reached) for state in states(stock, second).states] == [(True, True)]
    assert [(state.uses, state.reached) for state in states(stock, stranger).states] == [(False, False)]


def test_the_limit_in_the_newest_token_counts(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, limit=None, property="daily_tokens")
    _, [run] = admitted(stock, org_id)
    store, at = store_of(stock, stock.worker()), stock.now()

    def seen(value: Any, ago: int) -> None:
        claims = claims_of({} if value is None else {"daily_tokens": value}, at - timedelta(seconds=ago))
        asyncio.run(store.note_claims(org_id, claims))

    seen("100", 20)
    assert [state.limit for state in states(stock, run).states] == [100]
    seen(500, 30)
    assert [state.limit for state in states(stock, run).states] == [100]
    seen(200, 10)
    assert [state.limit for state in states(stock, run).states] == [200]
    seen(None, 5)
    assert states(stock, run) == spending.RunBudgets([], missing=None)
    spend(stock, run, 1)
    assert states(stock, run).missing == "daily_tokens"


def claims_of(properties: dict[str, Any], at: datetime) -> Claims:
    return Claims("org_1", "client", frozenset(), properties, {}, at, at + timedelta(hours=1))


def test_a_worker_knows_whose_runs_a_budget_limits(stock: Stock):
    org_id, other = stock.org(), stock.org()
    add_budget(stock, org_id)
    add_budget(stock, other, "runs", 9)
    store = store_of(stock, stock.worker())

    assert [store.is_limited(each) for each in (org_id, other)] == [True, False]
    add_budget(stock, None)
    asyncio.run(store.look_at_budgets())
    assert [store.is_limited(each) for each in (org_id, other)] == [True, True]


def park(stock: Stock, worker: WorkerId, run: AdmittedRun, kind: WaitKind = "budget") -> None:
    with stock.database.transaction() as connection:
        wait = NewWait(f"{kind}:{METER}", 1, kind, 3600.0)
        statements(connection).open_wait(
            connection, run.id, run.fencing_token, attempt=run.attempt, wait=wait
        )
    ended = stock.ended(run, "parked", outcome="parked", reason=kind, result=None)
    stock.finish(worker, ended)


def test_a_raise_wakes_the_parked_runs_of_its_org_and_no_others(stock: Stock):
    org_id, other = stock.org(), stock.org()
    worker, runs = admitted(stock, org_id, 2)
    foreign = stock.running(worker, other)
    park(stock, worker, runs[0])
    park(stock, worker, runs[1], "answer")
    park(stock, worker, foreign)

    with stock.database.transaction() as connection:
        assert budgets.wake(connection, [org_id], stock.database.now(connection)) == 1

    assert [stock.live(run.id)["state"] for run in (*runs, foreign)] == ["waiting", "parked", "parked"]


def test_a_raise_reaches_a_run_that_is_about_to_park(stock: Stock):
    org_id = stock.org()
    worker, [run] = admitted(stock, org_id)
    with stock.database.transaction() as connection:
        wait = NewWait(f"budget:{METER}", 1, "budget", 3600.0)
        statements(connection).open_wait(
            connection, run.id, run.fencing_token, attempt=run.attempt, wait=wait
        )
    with stock.database.transaction() as connection:
        budgets.wake(connection, [org_id], stock.database.now(connection))

    stock.finish(worker, stock.ended(run, "parked", outcome="parked", reason="budget", result=None))

    assert stock.live(run.id)["state"] == "waiting"


def test_a_copied_run_has_its_spends_and_they_are_not_counted_again(stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id)
    _, [run] = admitted(stock, org_id)
    store_steps(stock, step_of(run, 1, (METER, 20)))
    spend(stock, run, 3)
    copy = RunId(new_id())

    assert stock.within(spending.copy, org_id, run.id, copy) == 1

    copied = [row for row in stock.all(tables.spends) if row["run_id"] == copy]
    assert [(row["key"], row["amount"]) for row in copied] == [("step:1", 20)]
    assert used(stock, org_id) == [23]


@pytest.mark.parametrize("again", [True, False], ids=["", "control"])
def test_a_wait_that_is_stored_while_a_raise_commits_is_ended_by_its_second_look(
    postgres: Database, again: bool, monkeypatch: pytest.MonkeyPatch
):
    """Neither sees the other: the raise is not durable yet, and its first look has found no wait.

    On SQLite the writers stand in one queue.
    """
    stock = Stock(postgres)
    org_id = stock.org()
    add_budget(stock, org_id)
    _, [run] = admitted(stock, org_id)
    wake, looks = budgets.wake, []

    def look(connection, *given):
        found = wake(connection, *given)
        if not looks:
            with stock.database.transaction() as other:
                wait = NewWait(f"budget:{METER}", 1, "budget", 80_000.0)
                statements(other).open_wait(other, run.id, run.fencing_token, attempt=1, wait=wait)
        looks.append(found)
        return found

    monkeypatch.setattr(budgets, "wake", look)
    if not again:
        monkeypatch.setattr(operations_budgets, "wake_again", lambda *_: None)
    with stock.database.autocommit() as connection:
        code = connection.execute(select(tables.orgs.c.code).where(tables.orgs.c.id == org_id)).scalar_one()

    operations_budgets.raise_budget(stock.database, code, METER, by=50, per="day", actor="kim")

    with stock.database.autocommit() as connection:
        until = connection.execute(select(tables.waits.c.until)).scalar_one()
    assert (until <= stock.now()) is again


def spend_most(stock: Stock, run: AdmittedRun, times: int = 12) -> None:
    """Spend as much as a step can, again and again: 10**18 each."""
    for seq in range(1, times + 1):
        step = NewStep("s", str(seq), 1, seq, "1", stock.now(), stock.now(), ((METER, MAX_AMOUNT),) * 1000)
        with stock.database.transaction() as connection:
            ours, _ = spending.store_steps(connection, [RunStep(run, METER, step, 1)])
        assert len(ours) == 1


def test_no_amount_that_a_host_says_makes_a_sum_too_large_to_store(stock: Stock):
    """Else its transaction fails, with the steps of others that are stored in it."""
    org_id = stock.org()
    add_budget(stock, org_id, limit=MAX_AMOUNT)
    _, [run] = admitted(stock, org_id)

    spend_most(stock, run)

    assert used(stock, org_id) == [MAX_SUM]
    with stock.database.autocommit() as connection:
        assert connection.execute(select(tables.meter_days.c.used)).scalars().all() == [MAX_SUM]
        # The spends alone add up to more than a column holds.
        assert budgets.spent_by(connection, run.id, METER) == MAX_SUM
        [listed] = usage.usage(connection, ALL_ORGS, "meter")
        assert listed["used"] == MAX_SUM


def test_without_the_limit_of_sums_the_spends_of_an_org_cannot_be_stored(
    stock: Stock, monkeypatch: pytest.MonkeyPatch
):
    """The control. SQLite stores a number that is no integer, and cannot add up the spends any more."""
    monkeypatch.setattr(spending, "Capped", lambda number: number)
    monkeypatch.setattr(budgets, "CappedSum", func.sum)
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)

    with pytest.raises((DBAPIError, StoreUnavailable), match=r"out of range|overflow"):
        spend_most(stock, run)
        with stock.database.autocommit() as connection:
            budgets.spent_by(connection, run.id, METER)


def test_a_counter_that_begins_with_more_spends_than_it_holds_begins_at_its_limit(stock: Stock):
    org_id = stock.org()
    _, [run] = admitted(stock, org_id)
    spend_most(stock, run)

    add_budget(stock, org_id, limit=MAX_AMOUNT)

    assert used(stock, org_id) == [MAX_SUM]
    spend(stock, run, 1, key="1:99")
    assert used(stock, org_id) == [MAX_SUM]


@pytest.mark.parametrize("kept", [True, False], ids=["", "control"])
async def test_a_budget_is_told_of_although_the_process_of_the_run_has_ended(
    stock: Stock, emitted: list[Emitted], monkeypatch: pytest.MonkeyPatch, kept: bool
):
    """The spend is stored, and it alone passes the warning: nothing else tells of it in this period."""
    monkeypatch.setattr(CountSpend, "way", replace(CountSpend.way, kept=kept and CountSpend.way.kept))
    org_id = stock.org()
    add_budget(stock, org_id)
    worker, [run] = admitted(stock, org_id)
    store = WorkerStore(stock.database, worker, timedelta(seconds=30))
    inflight, tools = InflightRun(run, StopSignal()), SimpleNamespace(store=store)
    running = Running(inflight, Trail("h"), StoreActs(cast(Any, tools)), cast(Any, None), ManualClock())
    counted, go_on, spend = threading.Event(), threading.Event(), spending.spend

    def late(*given: Any) -> Any:
        found = spend(*given)
        counted.set()
        go_on.wait(5)
        return found

    monkeypatch.setattr(spending, "spend", late)
    asking = asyncio.create_task(answer(CountSpend(METER, 90, "1:1"), running))
    await asyncio.to_thread(counted.wait)
    asking.cancel()
    await asyncio.wait({asking})
    go_on.set()
    await inflight.stored()
    await stock.database.run(lambda: None)

    assert used(stock, org_id) == [90]
    told = [one.event.name for one in emitted if one.event.name == "budget.warned"]
    assert told == (["budget.warned"] if kept else [])
