"""Sixteen connections spend at once for 25 orgs: exact sums, and no call begins above a limit.

The meter may end above its limit by the calls that were in flight when it was reached, and no more.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random

import pytest
from sqlalchemy import select

from tests.fakes.clock import ManualClock
from tests.fakes.rows import reading, within
from tests.fakes.stock import Stock
from tests.integration.store.test_spending import METER, add_budget
from worker.ids import OrgId
from worker.model.definitions.budgets import MONEY
from worker.model.prices import ModelUsage, OwnPrice, Prices
from worker.model.runs.run import AdmittedRun
from worker.store import spending, tables
from worker.store.database import Database

SPENDERS = 16
ORGS = 25
CALLS = 240
# Tokens of a call: most are short, some are very long.
SIZES = (5, 8, 12, 20, 20, 35, 60, 110, 400, 1500)
Check = Callable[[Database, AdmittedRun], bool]


@dataclass(frozen=True)
class Call:
    """A call that was made and counted: from the check before it until its spend was durable."""

    org_id: OrgId
    began: int
    ended: int
    amount: int
    reached: bool


@dataclass
class History:
    """What the spenders saw, in the order of one counter: the calls, and those that began too late."""

    calls: list[Call] = field(default_factory=list)
    full: dict[OrgId, int] = field(default_factory=dict)
    late: int = 0
    now: Iterator[int] = field(default_factory=itertools.count)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spent(self) -> dict[OrgId, int]:
        total: dict[OrgId, int] = defaultdict(int)
        for call in self.calls:
            total[call.org_id] += call.amount
        return dict(total)

    def in_flight_at_limit(self, org_id: OrgId) -> int:
        """The calls that overlap the one that reached the limit, itself included."""
        calls = [call for call in self.calls if call.org_id == org_id]
        first = min((call for call in calls if call.reached), key=lambda call: call.ended)
        return sum(call.amount for call in calls if call.began <= first.ended and call.ended >= first.began)


def may_call(database: Database, run: AdmittedRun) -> bool:
    """As a worker decides before a new step."""
    return not any(state.used >= state.limit for state in reading(database, spending.states_of, run).states)


def stale() -> Check:
    """The control: what a worker would know that never asks again."""
    known: dict[OrgId, bool] = {}

    def check(database: Database, run: AdmittedRun) -> bool:
        if run.org_id not in known:
            known[run.org_id] = may_call(database, run)
        return known[run.org_id]

    return check


def spend_at_once(
    database: Database,
    runs: dict[OrgId, AdmittedRun],
    check: Check,
    calls: int = CALLS,
    prices: Prices | None = None,
) -> History:
    history = History()
    orgs = sorted(runs)

    def work(number: int) -> None:
        random = Random(number)
        for call in range(calls // SPENDERS):
            org_id = random.choice(orgs)
            run, amount = runs[org_id], random.choice(SIZES)
            with history.lock:
                began = next(history.now)
                was_full = org_id in history.full
            if not check(database, run):
                continue
            history.late += was_full
            key = f"{number}:{call}"
            # The answer to a commit may be lost: then the same spend is sent again.
            for _ in range(1 + (random.random() < 0.2)):
                priced = () if prices is None else (ModelUsage(None, "m", (("input", amount),)), prices)
                found = within(database, spending.spend, run, METER, amount, key, *priced)
                assert found is not None
            reached = any(state.used >= state.limit for state in found.states)
            with history.lock:
                ended = next(history.now)
                history.calls.append(Call(org_id, began, ended, amount, reached))
                if reached:
                    history.full.setdefault(org_id, ended)

    with ThreadPoolExecutor(SPENDERS) as spenders:
        for done in [spenders.submit(work, number) for number in range(SPENDERS)]:
            done.result()
    return history


@pytest.fixture
def database(migrated_postgres_url: str, clock: ManualClock):
    opened = Database.open(migrated_postgres_url, clock=clock, threads=SPENDERS)
    yield opened
    opened.close()


@pytest.fixture
def runs(database: Database) -> dict[OrgId, AdmittedRun]:
    """A running run for each of the orgs, of which the limits differ."""
    return runs_with_budgets(database, METER)


def runs_with_budgets(database: Database, meter: str) -> dict[OrgId, AdmittedRun]:
    stock, random = Stock(database), Random(7)
    orgs = [stock.org() for _ in range(ORGS)]
    for org_id in orgs:
        add_budget(stock, org_id, meter, limit=random.choice((200, 500, 1000, 2500)))
        add_budget(stock, org_id, meter, limit=10**9, per="month")
    stock.put(*stock.runs(orgs))
    return {run.org_id: run for run in stock.admit(stock.worker())}


def used_by_org(database: Database, meter: str = METER) -> dict[OrgId, set[int]]:
    """What each counter and each sum of an org says."""
    used: dict[OrgId, set[int]] = defaultdict(set)
    with database.autocommit() as connection:
        for table in (tables.meters, tables.meter_days):
            for row in connection.execute(select(table).where(table.c.meter == meter)).mappings():
                used[row["org_id"]].add(row["used"])
        totals: dict[OrgId, int] = defaultdict(int)
        of_meter = select(tables.spends).where(tables.spends.c.meter == meter)
        for row in connection.execute(of_meter).mappings():
            totals[row["org_id"]] += row["amount"]
    for org_id, total in totals.items():
        used[org_id].add(total)
    return used


def test_no_call_begins_above_a_limit_and_the_sums_are_exact(
    database: Database, runs: dict[OrgId, AdmittedRun]
):
    history = spend_at_once(database, runs, may_call)

    assert len(history.full) > ORGS // 2
    assert history.late == 0
    used = used_by_org(database)
    spent = history.spent()
    assert {org_id: {total} for org_id, total in spent.items()} == used
    with database.autocommit() as connection:
        limits = dict(
            connection.execute(
                select(tables.budgets.c.org_id, tables.budgets.c.limit).where(tables.budgets.c.per == "day")
            ).all()
        )
    for org_id in history.full:
        # Above the limit by the calls in flight when it was reached, at most.
        assert spent[org_id] < limits[org_id] + history.in_flight_at_limit(org_id)


def test_the_check_objects_to_a_worker_that_does_not_ask_again(
    database: Database, runs: dict[OrgId, AdmittedRun]
):
    """The control."""
    # Half of the calls are enough: no org that has reached its limit stops.
    history = spend_at_once(database, runs, stale(), calls=CALLS // 2)

    assert history.late > 0


def test_money_ends_above_its_limit_by_the_calls_in_flight_at_most(database: Database):
    """A token costs a nano-unit here, so amounts of money are those of tokens."""
    prices = Prices(own=[OwnPrice("m", {"input": Fraction(1, 1000)})])
    runs = runs_with_budgets(database, MONEY)

    history = spend_at_once(database, runs, may_call, prices=prices)

    assert len(history.full) > ORGS // 2
    assert history.late == 0
    spent = history.spent()
    assert {org_id: {total} for org_id, total in spent.items()} == used_by_org(database, MONEY)
    with database.autocommit() as connection:
        per_day = select(tables.budgets.c.org_id, tables.budgets.c.limit).where(tables.budgets.c.per == "day")
        limits = dict(connection.execute(per_day).all())
        days = connection.execute(select(tables.model_days.c.org_id, tables.model_days.c.money)).all()
    assert {org_id: money for org_id, money in days} == spent
    for org_id in history.full:
        assert spent[org_id] < limits[org_id] + history.in_flight_at_limit(org_id)
