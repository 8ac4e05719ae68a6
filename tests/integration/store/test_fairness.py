"""Fairness over held slots, on both databases: who floods and who holds on for hours keeps nobody waiting."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.fakes.stock import HANDLER, Stock
from worker.ids import OrgId, WorkerId
from worker.model.runs.run import AdmittedRun


class Slots:
    """One worker's slots, all of them taken whenever something waits."""

    def __init__(self, stock: Stock, count: int) -> None:
        self.stock = stock
        self.worker: WorkerId = stock.worker()
        self.held: list[AdmittedRun] = stock.admit(self.worker, count)
        self._chance = random.Random(1)

    def turn(self) -> list[AdmittedRun]:
        """One run ends, by chance; what is admitted in its place."""
        ended = self.held.pop(self._chance.randrange(len(self.held)))
        self.stock.finish(self.worker, self.stock.ended(ended))
        came = self.stock.admit(self.worker, 1)
        self.held += came
        return came


def org(stock: Stock, waiting: int, *, weight: int = 1) -> OrgId:
    """An org with room for any number of runs, and so many that wait."""
    made = stock.org(limit=100_000, weight=weight)
    for part in range(0, waiting, 500):
        stock.put(*stock.runs([made] * min(500, waiting - part)))
    return made


def test_five_runs_behind_ten_thousand_start_within_one_turn_of_the_slots(stock: Stock):
    count = 20
    org(stock, 10_000)
    slots = Slots(stock, count)
    few = org(stock, 5)

    admitted = [run.org_id for _ in range(2 * count) for run in slots.turn()]

    assert len(admitted) == 2 * count
    assert admitted.index(few) + 1 <= count + 1
    assert admitted.count(few) == 5


def test_slots_settle_at_the_weights_behind_an_org_that_held_them_all(stock: Stock):
    org(stock, 40)
    slots = Slots(stock, 40)
    light, heavy = org(stock, 300), org(stock, 300, weight=3)

    shares: Counter[OrgId] = Counter()
    for turn in range(300):
        slots.turn()
        if turn >= 200:
            shares.update(run.org_id for run in slots.held)

    assert shares[heavy] / shares[light] == pytest.approx(3, rel=0.1)


def test_who_holds_half_of_all_slots_for_hours_leaves_the_other_half_to_the_others(stock: Stock):
    """Its long runs never end and it has thousands more; the others share what is left, and evenly."""
    half, turns = 20, 200
    hog = org(stock, 1000)
    forever = stock.admit(stock.worker(), half)
    assert {run.org_id for run in forever} == {hog}
    others = [org(stock, 200) for _ in range(4)]
    slots = Slots(stock, half)

    shares: Counter[OrgId] = Counter()
    for turn in range(turns):
        assert {run.org_id for run in slots.turn()} <= set(others)
        if turn >= turns / 2:
            shares.update(run.org_id for run in slots.held)
    for other in others:
        assert shares[other] / shares.total() == pytest.approx(1 / len(others), rel=0.1)

    late = org(stock, 5)
    admitted = [run.org_id for _ in range(half + 1) for run in slots.turn()]
    assert late in admitted


def test_a_half_that_nobody_else_wants_goes_to_who_holds_the_other(stock: Stock):
    hog = org(stock, 50)
    stock.admit(stock.worker(), 20)
    other = org(stock, 2)

    slots = Slots(stock, 20)

    assert Counter(run.org_id for run in slots.held) == {hog: 18, other: 2}


def crowd(stock: Stock, orgs: int, waiting: int) -> list[OrgId]:
    """Orgs that wait with so many runs each."""
    made = [stock.org(limit=1000) for _ in range(orgs)]
    runs = stock.runs(made * waiting)
    for part in range(0, len(runs), 500):
        stock.put(*runs[part : part + 500])
    return made


def test_what_becomes_due_starts_with_the_next_admission_while_ten_thousand_wait(stock: Stock):
    crowd(stock, 200, 50)
    worker = stock.worker()
    stock.admit(worker, 100)
    new = [org(stock, 1) for _ in range(5)]

    admitted = Counter(run.org_id for run in stock.admit(worker, 100))

    assert set(new) <= set(admitted)
    # A tenth at most is not in turn, and all have equal shares.
    assert set(admitted.values()) == {1}
    assert admitted.total() == 100


def test_while_others_become_due_nine_tenths_go_on_in_turn(stock: Stock):
    waiting = set(crowd(stock, 120, 1))
    worker = stock.worker()

    turns = 0
    while waiting:
        runs = stock.admit(worker, 20)
        stock.finish(worker, *(stock.ended(run) for run in runs))
        waiting -= {run.org_id for run in runs}
        turns += 1
        assert turns <= 1 + 100 / 18 + 1
        # As many again become due in each turn.
        crowd(stock, 20, 1)

    assert turns > 1


def test_with_one_slot_every_tenth_admission_takes_the_newest(stock: Stock):
    crowd(stock, 60, 1)
    worker = stock.worker()
    stock.admit(worker, 1)
    new = org(stock, 1)

    admitted = [run.org_id for _ in range(10) for run in stock.admit(worker, 1)]

    assert new in admitted


def test_an_org_whose_runs_are_the_newest_gets_no_larger_share(stock: Stock):
    crowd(stock, 200, 2)
    worker = stock.worker()
    stock.admit(worker, 20)
    flood = org(stock, 500)

    admitted = Counter(run.org_id for _ in range(5) for run in stock.admit(worker, 20))

    assert admitted.total() == 100
    assert admitted[flood] == max(admitted.values()) == 1


def test_the_newest_of_an_org_goes_after_its_run_of_a_higher_priority(stock: Stock):
    crowd(stock, 200, 1)
    worker = stock.worker()
    stock.admit(worker, 20)
    made = stock.org()
    urgent, newest = stock.run(made, priority=5), stock.run(made)
    stock.put(urgent, newest)

    admitted = [run.id for run in stock.admit(worker, 20) if run.org_id == made]

    assert admitted == [urgent.id]


def test_the_newest_of_a_handler_at_its_limit_stays(stock: Stock):
    crowd(stock, 200, 1)
    worker = stock.worker(handlers=(HANDLER, "acme.heavy"))
    offered = {HANDLER: None, "acme.heavy": 2}
    stock.admit(worker, 20, offered=offered)
    stock.put(*(stock.run(stock.org(), handler="acme.heavy") for _ in range(5)))

    started = Counter(run.handler for _ in range(5) for run in stock.admit(worker, 20, offered=offered))

    assert started == {HANDLER: 98, "acme.heavy": 2}
