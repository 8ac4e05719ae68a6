"""Children of runs: one for each key, whatever is killed; their parents wake, and end with them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy import select

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock, await_lock
from tests.integration.store.test_spending import add_budget, step_of
from worker.handlers.steps import StepError
from worker.ids import ALL_ORGS, RunId, WorkerId
from worker.model.definitions.budgets import MONEY
from worker.model.prices import ModelUsage, OwnPrice, Prices
from worker.model.runs.budgets import decisive
from worker.model.runs.children import MAX_CHILDREN, MAX_TREE, ChildrenWait, FamilyCap, NewChild, PlacedChild
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import NewWait, WaitState
from worker.operations.runs import cancel
from worker.store import budgets, children, families, spending, sweeps, tables, waits, workers
from worker.store.database import Database
from worker.store.sql import statements
from worker.store.sql.contract import Rollups
from worker.store.worker_store import WorkerStore

CAP = FamilyCap(HANDLER, frozenset({"read:kb"}), frozenset(), (), frozenset())

# A nano-unit of the currency a token.
PRICES = Prices(own=[OwnPrice("house", {"input": Fraction(1, 1000)})])


@pytest.fixture
def worker(stock: Stock) -> WorkerId:
    return stock.worker()


def admitted(stock: Stock, worker: WorkerId, **values: Any) -> AdmittedRun:
    org = stock.org(limit=1000)
    return stock.running(worker, org, stock.definition(org), **values)


def pages(count: int, first: int = 0, **values: Any) -> list[NewChild]:
    return [
        NewChild(HANDLER, f"page-{n}", 1, f'{{"page":{n}}}', **values) for n in range(first, first + count)
    ]


def start(
    stock: Stock, run: AdmittedRun, new: Sequence[NewChild], *, keep: bool = False
) -> list[PlacedChild] | str | None:
    return stock.within(children.start, run, new, cap=CAP, keep=keep, isolations={HANDLER: "child"})


def started(stock: Stock, run: AdmittedRun, count: int, **values: Any) -> list[RunId]:
    placed = start(stock, run, pages(count, **values))
    assert isinstance(placed, list)
    return [RunId(child.run_id) for child in placed]


def wait(stock: Stock, run: AdmittedRun, *spans: tuple[int, int], any: bool = False) -> WaitState | None:
    new = NewWait("children:gather", 1, "children", children=ChildrenWait(spans, any))
    return stock.within(families.open_wait, run, new)


def park(stock: Stock, worker: WorkerId, run: AdmittedRun) -> None:
    end = replace(stock.ended(run, "parked", outcome="parked", reason="children"), has_children=True)
    assert stock.finish(worker, end) == {run.id}


def of_child(end: EndedAttempt) -> EndedAttempt:
    return replace(end, is_child=True)


def finish(stock: Stock, worker: WorkerId, runs: Sequence[AdmittedRun], state: str = "succeeded") -> None:
    """End children, and settle their families as a worker does."""
    stock.finish(worker, *(of_child(stock.ended(run, state)) for run in runs))
    stock.within(families.settle, [run.id for run in runs])


def look(stock: Stock) -> int:
    """Look at all families, as a worker does; returns how many runs changed."""
    looked = stock.within(families.look)
    return looked.changed + stock.within(families.orphan_found, looked.found)


def states(stock: Stock, ids: Sequence[RunId]) -> list[str | None]:
    return [stock.stored(id_)["state"] or stock.unended(id_)["state"] for id_ in ids]


def test_children_wait_as_runs_of_the_definition_of_their_parent(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)

    placed = start(stock, run, pages(3))

    assert isinstance(placed, list) and [child.place for child in placed] == [1, 2, 3]
    row, live = stock.stored(placed[1].run_id), stock.unended(placed[1].run_id)
    assert (row["org_id"], row["definition_id"], row["origin"]) == (run.org_id, run.definition_id, "child")
    assert (row["handler"], row["params"], row["scheduled_for"]) == (HANDLER, {"page": 1}, run.scheduled_for)
    assert (live["state"], live["serial"], live["parent_id"], live["place"]) == ("waiting", False, run.id, 2)
    [child, *_] = stock.admit(worker, 1)
    assert (child.id, child.origin, child.params) == (placed[0].run_id, "child", {"page": 0})


def test_a_key_makes_one_child_in_all_attempts(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    first = start(stock, run, pages(2))
    stock.finish(worker, stock.ended(run, "waiting"))
    stock.make_available(run.id)
    again = next(each for each in stock.admit(worker) if each.id == run.id)

    second = start(stock, again, pages(3))

    assert isinstance(first, list) and isinstance(second, list)
    assert [child.run_id for child in second[:2]] == [child.run_id for child in first]
    assert [child.place for child in second] == [1, 2, 3]
    assert len(stock.all(tables.children)) == 3
    # The answer may have been lost: the same call again.
    assert start(stock, again, pages(3)) == second


def test_an_attempt_that_lost_its_run_starts_nothing(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    stock.change(tables.live_runs, run.id, fencing_token=run.fencing_token + 1)

    assert start(stock, run, pages(1)) is None
    assert stock.all(tables.children) == stock.all(tables.parents) == []


def test_a_run_that_is_being_cancelled_starts_nothing(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    stock.change(tables.live_runs, run.id, cancel_requested_at=stock.now(), cancel_reason="requested")

    assert start(stock, run, pages(1)) == "cancelled"
    assert stock.all(tables.children) == []


def test_limits_are_errors_and_store_nothing(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 1)
    stock.change(tables.parents, run.id, started=MAX_CHILDREN)
    with pytest.raises(StepError, match="10,000 children"):
        start(stock, run, pages(1, 1))
    stock.change(tables.parents, run.id, started=1, tree=MAX_TREE)
    with pytest.raises(StepError, match="100,000 runs"):
        start(stock, run, pages(1, 1))
    assert len(stock.all(tables.children)) == 1


def test_depth_is_limited(stock: Stock, worker: WorkerId) -> None:
    run = root = admitted(stock, worker)
    for _ in range(4):
        started(stock, run, 1)
        [run] = stock.admit(worker)

    with pytest.raises(StepError, match="4 levels"):
        start(stock, run, pages(1))
    rows = stock.all(tables.children)
    assert sorted(row["depth"] for row in rows) == [1, 2, 3, 4]
    assert {row["root_id"] for row in rows} == {root.id}
    assert stock.reading(children.root_of, run.id) == root.id
    [top] = stock.all(tables.parents, tables.parents.c.run_id == root.id)
    assert top["tree"] == 4


def test_a_parent_goes_on_once_its_last_child_has_ended(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 3)
    assert wait(stock, run, (1, 3)) == WaitState("children", "pending")
    park(stock, worker, run)
    one, two, three = stock.admit(worker)

    finish(stock, worker, [one, three])
    assert stock.unended(run.id)["state"] == "parked"
    finish(stock, worker, [two])

    live = stock.unended(run.id)
    assert (live["state"], live["reason"]) == ("waiting", "resumed")
    [again] = stock.admit(worker)
    assert wait(stock, again, (1, 3)) == WaitState("children", "over")


def test_a_wait_for_some_children_does_not_wait_for_others(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 5)
    wait(stock, run, (1, 1), (3, 4))
    park(stock, worker, run)
    one, _, three, four, _ = stock.admit(worker)

    finish(stock, worker, [one, three])
    assert stock.unended(run.id)["state"] == "parked"
    finish(stock, worker, [four])
    assert stock.unended(run.id)["state"] == "waiting"


def test_a_parent_that_parks_after_its_last_child_ended_goes_on(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 1)
    assert wait(stock, run, (1, 1)) == WaitState("children", "pending")
    [child] = stock.admit(worker)

    # The child's worker looks before the park is committed, the parent's after it.
    finish(stock, worker, [child])
    park(stock, worker, run)
    stock.within(families.settle, [], [run.id])

    assert stock.unended(run.id)["state"] == "waiting"


def test_two_last_children_that_end_at_once_wake_their_parent(postgres: Any) -> None:
    """Neither transaction sees the other's end; each looks once its own is committed."""
    stock = Stock(postgres)
    worker = stock.worker()
    run = admitted(stock, worker)
    started(stock, run, 2)
    wait(stock, run, (1, 2))
    park(stock, worker, run)
    one, two = stock.admit(worker)

    with postgres.transaction() as held:
        stock.finish(worker, of_child(stock.ended(one)))
        # As the end of the other one, which is not committed yet.
        held.execute(tables.live_runs.delete().where(tables.live_runs.c.id == two.id))
        stock.within(families.settle, [one.id])
        assert stock.unended(run.id)["state"] == "parked"
    # Control: the look of the first one missed the second.
    assert stock.unended(run.id)["state"] == "parked"
    stock.within(families.settle, [two.id])
    assert stock.unended(run.id)["state"] == "waiting"


def test_what_a_dead_worker_left_is_found(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 1)
    wait(stock, run, (1, 1))
    park(stock, worker, run)
    [child] = stock.admit(worker)
    stock.finish(worker, of_child(stock.ended(child)))
    assert stock.unended(run.id)["state"] == "parked"

    assert look(stock) == 1
    assert stock.unended(run.id)["state"] == "waiting"
    assert look(stock) == 0


def test_results_are_read_in_their_order(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 3)
    one, two, _ = stock.admit(worker)
    finish(stock, worker, [two])
    failed = replace(stock.ended(one, "failed"), reason="error", error={"type": "E", "message": "m"})
    stock.finish(worker, of_child(failed))

    page = stock.reading(children.read, run.id, [3, 1, 2])

    rows = [(row.place, row.state, row.reason, row.result_json) for row in page.rows]
    assert rows == [(1, "failed", "error", None), (2, "succeeded", None, rows[1][3]), (3, None, None, None)]
    assert rows[1][3] is not None and rows[1][3].replace(" ", "") == '{"articles":3}'
    assert page.rows[0].error == {"type": "E", "message": "m"}


def test_the_order_in_which_children_ended_stays(stock: Stock, worker: WorkerId, clock: ManualClock) -> None:
    run = admitted(stock, worker)
    started(stock, run, 4)
    one, two, three, four = stock.admit(worker)
    finish(stock, worker, [three])
    clock.advance(timedelta(seconds=1))
    finish(stock, worker, [one])

    first = stock.within(children.read_ended, run, [(1, 3)], 0)
    finish(stock, worker, [two, four])
    second = stock.within(children.read_ended, run, [(1, 3)], 2)
    again = stock.within(children.read_ended, run, [(1, 3)], 0)
    rest = stock.within(children.read_ended, run, [(4, 4)], 0)

    assert first and second and again and rest
    assert [(row.place, row.seen) for row in first.rows] == [(3, 1), (1, 2)]
    assert [(row.place, row.seen) for row in second.rows] == [(2, 3)]
    assert [row.place for row in again.rows] == [3, 1, 2]
    assert [row.place for row in rest.rows] == [4]


def test_a_parent_that_takes_children_as_they_end_goes_on_once_a_second(
    stock: Stock, worker: WorkerId, clock: ManualClock
) -> None:
    run = admitted(stock, worker)
    started(stock, run, 3)
    assert wait(stock, run, (1, 3), any=True) == WaitState("children", "pending")
    opened = stock.all(tables.waits)[0]["opened_at"]
    park(stock, worker, run)
    one, *_ = stock.admit(worker)

    finish(stock, worker, [one])

    live = stock.unended(run.id)
    assert (live["state"], live["available_at"]) == ("waiting", opened + timedelta(seconds=1))
    stock.make_available(run.id)
    [again] = stock.admit(worker)
    assert wait(stock, again, (1, 3), any=True) == WaitState("children", "over")
    assert stock.within(children.read_ended, again, [(1, 3)], 0)
    assert wait(stock, again, (1, 3), any=True) == WaitState("children", "pending")


def test_a_window_is_filled_as_its_children_end(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 5, map=1, window=2)
    wait(stock, run, (1, 5))
    park(stock, worker, run)

    assert states(stock, ids) == ["waiting", "waiting", "parked", "parked", "parked"]
    one, two = stock.admit(worker)
    finish(stock, worker, [two])
    assert states(stock, ids) == ["running", "succeeded", "waiting", "parked", "parked"]
    [three] = stock.admit(worker)
    finish(stock, worker, [one, three])
    assert states(stock, ids)[3:] == ["waiting", "waiting"]
    finish(stock, worker, stock.admit(worker))
    assert stock.unended(run.id)["state"] == "waiting"
    assert stock.all(tables.parents)[0]["windows"] == {"1": -2}


def test_cancelling_a_parent_cancels_its_whole_tree(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 3)
    one, two, three = stock.admit(worker)
    below = started(stock, one, 2)
    wait(stock, one, (1, 2))
    park(stock, worker, one)
    stock.finish(worker, stock.ended(three, "waiting"))
    now = stock.now()

    stock.within(families.cancel_below, run.org_id, run.id, at=now)

    assert states(stock, ids) == ["cancelled", "running", "cancelled"]
    assert states(stock, below) == ["cancelled", "cancelled"]
    assert stock.stored(below[0])["reason"] == "parent"
    assert stock.unended(two.id)["cancel_reason"] == "parent"
    assert stock.unended(run.id)["cancel_requested_at"] is None


def test_cancelling_a_parent_cancels_what_its_ended_children_started(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 1)
    [one] = stock.admit(worker)
    below = started(stock, one, 2)
    [two] = stock.admit(worker, 1)
    deepest = started(stock, two, 1)
    finish(stock, worker, [one, two])

    stock.within(families.cancel_below, run.org_id, run.id, at=stock.now())

    assert states(stock, [*below, *deepest]) == ["succeeded", "cancelled", "cancelled"]


@pytest.mark.parametrize(("keep", "left"), [(False, "cancelled"), (True, "waiting")])
def test_a_failed_parent_cancels_the_children_that_wait(
    stock: Stock, worker: WorkerId, keep: bool, left: str
) -> None:
    run = admitted(stock, worker)
    placed = start(stock, run, pages(2), keep=keep)
    assert isinstance(placed, list)
    [running] = stock.admit(worker, 1)
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error", has_children=True))

    stock.within(families.orphan, [run.id])
    assert states(stock, [RunId(child.run_id) for child in placed]) == ["running", left]
    assert stock.unended(running.id)["cancel_requested_at"] is None
    # What a dead worker did not do, another does.
    assert look(stock) == 0


@pytest.mark.parametrize(
    ("state", "keep", "left"),
    [
        ("failed", False, "cancelled"),
        ("failed", True, "waiting"),
        ("cancelled", True, "cancelled"),
        ("succeeded", False, "waiting"),
        (None, False, "waiting"),
    ],
)
def test_a_child_that_ran_as_its_parent_failed_does_not_wait_for_another_attempt(
    stock: Stock, worker: WorkerId, state: str | None, keep: bool, left: str
) -> None:
    """It is cancelled with its end: another worker might take it before its family is looked at."""
    run = admitted(stock, worker)
    start(stock, run, pages(1), keep=keep)
    [child] = stock.admit(worker, 1)
    if state is not None:
        stock.finish(worker, replace(stock.ended(run, state), reason="error", has_children=True))

    stock.finish(worker, replace(of_child(stock.ended(child, "waiting")), reason="error"))

    assert states(stock, [child.id]) == [left]
    if left == "cancelled":
        assert stock.stored(child.id)["reason"] == "parent"


def test_a_child_that_waits_again_just_before_its_parent_fails_is_cancelled(
    stock: Stock, worker: WorkerId
) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 1)
    [child] = stock.admit(worker, 1)
    stock.finish(worker, replace(of_child(stock.ended(child, "waiting")), reason="error"))
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error", has_children=True))

    stock.within(families.orphan_waiting, ids)

    assert states(stock, ids) == ["cancelled"]


def test_a_child_of_a_lost_worker_does_not_wait_for_another_attempt_once_its_parent_has_failed(
    stock: Stock, worker: WorkerId
) -> None:
    run, lost = admitted(stock, worker), stock.worker()
    ids = started(stock, run, 1)
    stock.admit(lost, 1)
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error", has_children=True))
    stock.within(families.orphan, [run.id])
    stock.change(tables.workers, lost, ended_at=stock.now())

    recovered = stock.within(workers.recover, max_recoveries=3, by=worker)

    assert [each.run_id for each in recovered] == ids
    assert states(stock, ids) == ["cancelled"]


def test_children_of_a_parent_that_succeeded_go_on(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 2)
    stock.finish(worker, replace(stock.ended(run), has_children=True))

    stock.within(families.orphan, [run.id])
    look(stock)

    assert states(stock, ids) == ["waiting", "waiting"]


def test_ends_of_children_are_not_listed_and_do_not_fail_their_definition(
    stock: Stock, worker: WorkerId
) -> None:
    run = admitted(stock, worker)
    started(stock, run, 2)
    one, two = stock.admit(worker)

    finish(stock, worker, [one])
    stock.finish(worker, replace(of_child(stock.ended(two, "failed")), reason="error"))

    assert stock.all(tables.run_ends) == []
    assert stock.all(tables.failing_definitions) == []


def test_orgs_beside_a_large_tree_get_their_share_of_the_slots(stock: Stock, worker: WorkerId) -> None:
    """A single run of another org gets the next free slot; with as much to do, half of all slots."""
    run = admitted(stock, worker)
    for first in range(0, 10_000, 400):
        start(stock, run, pages(400, first))
    wait(stock, run, (1, 10_000))
    park(stock, worker, run)
    slots = stock.admit(worker, 8)
    other = stock.org(limit=1000)
    stock.put(*stock.runs([other]))

    finish(stock, worker, slots[:1])
    [next_] = stock.admit(worker, 1)

    assert next_.org_id == other
    stock.put(*stock.runs([other] * 100))
    finish(stock, worker, slots[1:])
    finish(stock, worker, [next_])
    assert Counter(each.org_id for each in stock.admit(worker, 8)) == {run.org_id: 4, other: 4}


def test_one_slot_is_enough_for_a_tree_of_four_levels(stock: Stock, worker: WorkerId) -> None:
    org = stock.org(limit=1)
    run = stock.running(worker, org, stock.definition(org), max_concurrent=1)
    above: list[AdmittedRun] = []
    for _ in range(4):
        started(stock, run, 2)
        wait(stock, run, (1, 2))
        park(stock, worker, run)
        above.append(run)
        [run] = stock.admit(worker)
    ended = 0
    while True:
        if run.id in {each.id for each in above}:
            assert wait(stock, run, (1, 2)) == WaitState("children", "over")
        if run.origin == "child":
            finish(stock, worker, [run])
        else:
            stock.finish(worker, stock.ended(run))
        ended += 1
        following = stock.admit(worker)
        if not following:
            break
        [run] = following

    assert ended == 9
    assert stock.all(tables.live_runs) == []


def test_counts_are_by_state(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 4, map=1, window=3)
    one, two, _ = stock.admit(worker)
    finish(stock, worker, [one])
    finish(stock, worker, [two], "refused")

    counts = stock.reading(children.counts, ALL_ORGS, run.id)

    assert (counts.total, counts.ended, counts.failed) == (4, 2, 1)
    assert counts.by_state == {"succeeded": 1, "refused": 1, "running": 1, "waiting": 1}


def test_a_retry_takes_up_children_that_succeeded(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 4)
    one, two, three, _ = stock.admit(worker)
    finish(stock, worker, [one])
    finish(stock, worker, [two], "failed")
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")

    assert stock.within(children.take_up, run.org_id, run.id, retry.id) == 3
    placed = start(stock, retry, pages(5))

    assert isinstance(placed, list)
    taken = {child.run_id: child.place for child in placed}
    assert [taken.get(id_) for id_ in ids] == [1, None, 2, 3]
    assert sorted(taken.values()) == [1, 2, 3, 4, 5]
    assert stock.unended(three.id)["parent_id"] == retry.id
    wait(stock, retry, (1, 5))


def test_a_second_retry_leaves_unfinished_children_to_the_first(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 2)
    one, two = stock.admit(worker)
    finish(stock, worker, [one])
    stock.finish(worker, stock.ended(run, "failed", reason="error"))
    first, second = (
        stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry") for _ in "12"
    )

    taken = [stock.within(children.take_up, run.org_id, run.id, one.id) for one in (first, second)]

    assert taken == [2, 1]
    assert stock.unended(two.id)["parent_id"] == first.id


def test_a_retry_leaves_children_that_are_being_cancelled(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 2)
    [one] = stock.admit(worker, 1)
    stock.within(families.cancel_below, run.org_id, run.id, at=stock.now())
    stock.finish(worker, stock.ended(run, "cancelled", reason="requested"))
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")

    assert stock.within(children.take_up, run.org_id, run.id, retry.id) == 0
    assert stock.unended(one.id)["parent_id"] == run.id


def test_what_children_may_do_is_that_of_the_last_attempt(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 1)
    narrower = replace(CAP, scopes=frozenset())

    stock.within(children.start, run, pages(1), cap=narrower, keep=False, isolations={HANDLER: "child"})

    assert stock.within(children.caps_of, [run.id]) == {run.id: narrower}
    [child] = stock.admit(worker, 1)
    assert child.parent_id == run.id


def test_children_are_forgotten_with_the_run_at_the_top(
    stock: Stock, worker: WorkerId, clock: ManualClock
) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 2)
    one, two = stock.admit(worker)
    below = started(stock, one, 2)
    finish(stock, worker, stock.admit(worker))
    finish(stock, worker, [one, two])
    clock.advance(timedelta(days=30))
    week = timedelta(days=7)

    def forget() -> int:
        while stock.within(sweeps.forget_trees, "succeeded", week, runs=500, limit=2):
            pass
        return stock.within(sweeps.forget_runs, "succeeded", week, limit=500)

    # Their parent may still read them.
    assert forget() == 0
    assert states(stock, [*ids, *below]) == ["succeeded"] * 4
    stock.finish(worker, replace(stock.ended(run), has_children=True))
    assert forget() == 0
    clock.advance(timedelta(days=8))

    assert forget() == 1
    assert stock.all(tables.runs) == stock.all(tables.children) == stock.all(tables.parents) == []


def test_a_run_with_an_unfinished_child_keeps_no_other_from_being_forgotten(
    stock: Stock, worker: WorkerId, clock: ManualClock
) -> None:
    """A batch takes the oldest: as many that must stay, of one suspended org, ended the retention of all."""
    run = admitted(stock, worker)
    started(stock, run, 1)
    stock.admit(worker)
    stock.finish(worker, replace(stock.ended(run), has_children=True))
    clock.advance(timedelta(seconds=1))
    other = admitted(stock, worker)
    stock.finish(worker, stock.ended(other))
    clock.advance(timedelta(days=30))
    week = timedelta(days=7)

    stock.within(sweeps.forget_parts, "succeeded", week, runs=1, limit=5)
    assert stock.within(sweeps.forget_runs, "succeeded", week, limit=1) == 1

    assert [row["run_id"] for row in stock.all(tables.attempts)] == [run.id]
    assert states(stock, [run.id]) == ["succeeded"]


def test_a_child_that_a_retry_has_taken_up_outlives_its_first_parent(
    stock: Stock, worker: WorkerId, clock: ManualClock
) -> None:
    run = admitted(stock, worker)
    [id_, _] = started(stock, run, 2)
    finish(stock, worker, stock.admit(worker))
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    clock.advance(timedelta(days=30))
    retry = stock.running(None, run.org_id, run.definition_id, retry_of=run.id, origin="retry")
    stock.within(children.take_up, run.org_id, run.id, retry.id)
    week = timedelta(days=7)

    assert stock.within(sweeps.forget_trees, "failed", week, runs=500, limit=500) == 2
    assert stock.within(sweeps.forget_runs, "failed", week, limit=500) == 1

    page = stock.reading(children.read, retry.id, [1, 2])
    assert [row.state for row in page.rows] == ["succeeded", "succeeded"]
    assert stock.stored(id_)["state"] == "succeeded"


def test_a_tree_is_cancelled_while_runs_of_it_end(postgres: Database) -> None:
    """A retry is newer than the children that it took up: who locks it first waits for a batch of ends."""
    stock = Stock(postgres)
    worker = stock.worker()
    run = admitted(stock, worker)
    [id_] = started(stock, run, 1)
    stock.admit(worker)
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")
    stock.within(children.take_up, run.org_id, run.id, retry.id)
    row = select(tables.live_runs.c.id).with_for_update()

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as batch:
            batch.execute(row.where(tables.live_runs.c.id == id_)).one()
            cancelled = pool.submit(cancel, postgres, retry.id, actor="ada")
            await_lock(postgres)
            batch.execute(row.where(tables.live_runs.c.id == retry.id)).one()
        cancelled.result()

    assert stock.unended(id_)["cancel_reason"] == "parent"
    assert stock.unended(retry.id)["cancel_reason"] == "requested"


def test_a_tree_is_cancelled_while_a_run_of_it_is_admitted_and_ends(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends lock their runs, then the sums of their org."""
    stock = Stock(postgres)
    worker = stock.worker()
    run = admitted(stock, worker)
    [id_] = started(stock, run, 1)
    wait(stock, run, (1, 1))
    park(stock, worker, run)
    row = select(tables.live_runs.c.id).with_for_update().where(tables.live_runs.c.id == id_)
    lock_attempt = waits.lock_attempt

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as batch:

            def admit(*given: Any) -> Any:
                """Just after what runs of the tree was locked."""
                stock.admit(worker)
                batch.execute(row).one()
                return lock_attempt(*given)

            monkeypatch.setattr(waits, "lock_attempt", admit)
            cancelled = pool.submit(cancel, postgres, run.id, actor="ada")
            await_lock(postgres)
            day = stock.now().date(), run.org_id, 1, 1, 0
            statements(batch).add_rollups(batch, Rollups([day], []))
        cancelled.result()

    assert states(stock, [run.id]) == ["cancelled"]
    assert stock.unended(id_)["cancel_reason"] == "parent"


def test_children_that_did_not_succeed_start_again_in_their_places(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    ids = started(stock, run, 3)
    wait(stock, run, (1, 3))
    park(stock, worker, run)
    one, two, three = stock.admit(worker)
    finish(stock, worker, [one, three])
    finish(stock, worker, [two], "failed")
    assert stock.unended(run.id)["state"] == "waiting"
    [again] = stock.admit(worker)

    at = stock.now()
    count = stock.within(children.restart, run.org_id, run.id, lambda handler, pool: "child", at=at, by="kim")

    assert count == 1
    assert wait(stock, again, (1, 3)) == WaitState("children", "pending")
    [new] = [row for row in stock.all(tables.children) if row["run_id"] not in ids]
    before, after = stock.stored(ids[1]), stock.stored(new["run_id"])
    assert (new["place"], after["retry_of"], after["params"]) == (2, ids[1], before["params"])
    assert after["idempotency_key"] == before["idempotency_key"]
    [child] = stock.admit(worker)
    finish(stock, worker, [child])
    assert wait(stock, again, (1, 3)) == WaitState("children", "over")


def open_of(stock: Stock, run: AdmittedRun) -> list[int]:
    """The places of the unfinished children of a run that need not wait for their window."""
    rows = [row for row in stock.all(tables.live_runs) if row["parent_id"] == run.id]
    return sorted(row["place"] for row in rows if row["reason"] != "window")


def test_children_that_start_again_wait_for_the_window_of_their_map(stock: Stock, worker: WorkerId) -> None:
    """Also if later ones of the map are running, and others have not been released yet."""
    run = admitted(stock, worker)
    started(stock, run, 7, map=1, window=2)
    for _ in range(2):
        finish(stock, worker, stock.admit(worker), "failed")
    running = stock.admit(worker)
    assert open_of(stock, run) == [5, 6]

    at = stock.now()
    stock.within(children.restart, run.org_id, run.id, lambda handler, pool: "child", at=at, by="kim")

    assert open_of(stock, run) == [5, 6]
    finish(stock, worker, running[:1])
    assert open_of(stock, run) == [1, 6]
    started(stock, run, 8, map=1, window=2)
    assert open_of(stock, run) == [1, 6]
    running = running[1:]
    while running:
        finish(stock, worker, running)
        running = stock.admit(worker)
        assert len(open_of(stock, run)) <= 2
    assert {row["state"] for row in stock.all(tables.runs) if row["retry_of"]} == {"succeeded"}
    assert open_of(stock, run) == []


def test_what_a_tree_spends_counts_for_the_budget_of_each_run_in_it(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 2)
    one, two = stock.admit(worker)
    other = admitted(stock, worker)
    for each, amount in ((run, 1), (one, 2), (two, 4), (other, 8)):
        stock.within(spending.spend, each, "tickets", amount, "1:1")

    def spent(of: RunId) -> int:
        return stock.reading(budgets.spent_in_tree, of, "tickets")

    assert spent(stock.reading(children.root_of, one.id)) == spent(run.id) == 7
    assert spent(other.id) == 8
    # With the same key it counts once.
    stock.within(spending.spend, one, "tickets", 2, "1:1")
    assert spent(run.id) == 7
    assert [row["used"] for row in stock.all(tables.tree_spends)] == [6]


def test_the_money_of_children_counts_for_the_budget_of_their_tree(stock: Stock, worker: WorkerId) -> None:
    """By spends and by steps, once for each key. The run at the top stops, and so does each child."""
    run = admitted(stock, worker)
    add_budget(stock, run.org_id, MONEY, limit=100, per="run", at_limit="fail")
    started(stock, run, 2)
    one, two = stock.admit(worker)
    used = ModelUsage(None, "house", (("input", 30),))
    for each in (run, one, one):
        stock.within(spending.spend, each, "tokens", 30, "1:1", used, PRICES)

    def is_stopped(each: AdmittedRun) -> bool:
        return decisive(stock.reading(spending.states_of, each).states) is not None

    before = [is_stopped(each) for each in (run, one, two)]
    step = step_of(two, 1, ("tokens", 40))
    step.step.used = (ModelUsage(None, "house", (("input", 40),)),)
    stock.within(spending.store_steps, [step, step], PRICES)

    assert (before, [is_stopped(each) for each in (run, one, two)]) == ([False] * 3, [True] * 3)
    assert stock.reading(budgets.spent_in_tree, run.id, MONEY) == 30 + 30 + 40
    trees = {row["meter"]: row["used"] for row in stock.all(tables.tree_spends)}
    assert trees == {MONEY: 70, "tokens": 70}
    assert sum(row["money"] for row in stock.all(tables.model_days)) == 100


def test_a_retry_has_spent_what_the_children_that_it_takes_up_have(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    started(stock, run, 3)
    one, two, three = stock.admit(worker)
    for each, amount in ((run, 1), (one, 2), (two, 4), (three, 8)):
        stock.within(spending.spend, each, "tickets", amount, "1:1")
    finish(stock, worker, [one])
    finish(stock, worker, [two], "failed")
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")

    stock.within(children.take_up, run.org_id, run.id, retry.id)
    stock.within(spending.take_up, run.org_id, retry.id)
    stock.within(spending.spend, three, "tickets", 16, "1:2")

    assert stock.reading(budgets.spent_in_tree, retry.id, "tickets") == 2 + 8 + 16


def test_a_run_that_was_lost_with_its_worker_leaves_its_children(stock: Stock, worker: WorkerId) -> None:
    """The next attempt finds them."""
    run = admitted(stock, worker)
    ids = started(stock, run, 2)
    stock.change(tables.workers, worker, ended_at=stock.now())
    second = stock.worker()
    stock.within(workers.recover, max_recoveries=3, by=second)
    stock.make_available(run.id)
    again = next(each for each in stock.admit(second) if each.id == run.id)

    placed = start(stock, again, pages(2))

    assert isinstance(placed, list)
    assert [child.run_id for child in placed] == ids


def test_a_child_that_was_lost_for_good_counts_in_no_hour(stock: Stock, worker: WorkerId) -> None:
    run, lost = admitted(stock, worker), stock.worker()
    ids = started(stock, run, 1)
    stock.admit(lost, 1)
    stock.change(tables.workers, lost, ended_at=stock.now())

    stock.within(workers.recover, max_recoveries=0, by=worker)

    assert states(stock, ids) == ["failed"]
    assert stock.all(tables.rollup_hours) == []


def test_a_child_that_was_started_again_is_forgotten_with_its_tree(
    stock: Stock, worker: WorkerId, clock: ManualClock
) -> None:
    run = admitted(stock, worker)
    started(stock, run, 1)
    finish(stock, worker, stock.admit(worker), "failed")
    for _ in range(2):
        at = stock.now()
        restart = stock.within(
            children.restart, run.org_id, run.id, lambda handler, pool: "child", at=at, by="kim"
        )
        assert restart == 1
        finish(stock, worker, stock.admit(worker), "failed")
    stock.finish(worker, replace(stock.ended(run), has_children=True))
    clock.advance(timedelta(days=30))
    week = timedelta(days=7)

    while stock.within(sweeps.forget_trees, "succeeded", week, runs=500, limit=2):
        pass
    assert stock.within(sweeps.forget_runs, "succeeded", week, limit=500) == 1

    assert stock.all(tables.runs) == stock.all(tables.attempts) == []


def test_what_ended_children_started_is_cancelled_some_at_a_time(
    stock: Stock, worker: WorkerId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "CANCELLED", 2)
    run = admitted(stock, worker)
    started(stock, run, 1)
    [child] = stock.admit(worker)
    below = started(stock, child, 5)
    finish(stock, worker, [child])
    stock.within(families.cancel_below, run.org_id, run.id, at=stock.now())
    stock.finish(worker, replace(stock.ended(run, "cancelled", reason="requested"), has_children=True))
    stock.within(families.orphan, [run.id])

    for _ in range(5):
        look(stock)

    assert states(stock, below) == ["cancelled"] * 5


def test_a_retry_has_spent_what_is_below_the_children_that_it_takes_up(
    stock: Stock, worker: WorkerId
) -> None:
    run = admitted(stock, worker)
    started(stock, run, 2)
    done, child = stock.admit(worker)
    for each in (done, child):
        started(stock, each, 1)
    ended, below = sorted(stock.admit(worker), key=lambda each: each.parent_id != done.id)
    for each, amount in ((ended, 1), (below, 2), (child, 4)):
        stock.within(spending.spend, each, "tickets", amount, "1:1")
    finish(stock, worker, [ended])
    finish(stock, worker, [done])
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")

    stock.within(children.take_up, run.org_id, run.id, retry.id)
    stock.within(spending.take_up, run.org_id, retry.id)
    stock.within(spending.spend, below, "tickets", 8, "1:2")
    started(stock, child, 2)
    [new] = stock.admit(worker)
    stock.within(spending.spend, new, "tickets", 16, "1:1")

    assert stock.reading(children.root_of, below.id) == stock.reading(children.root_of, new.id) == retry.id
    assert stock.reading(budgets.spent_in_tree, retry.id, "tickets") == 1 + 2 + 4 + 8 + 16


def test_a_retry_starts_the_next_children_of_a_map_that_it_takes_up(stock: Stock, worker: WorkerId) -> None:
    """Those that ran are left out if they are being cancelled: no end of theirs makes room in its window."""
    run = admitted(stock, worker)
    started(stock, run, 5, map=1, window=2)
    for one in stock.admit(worker):
        cancel(stock.database, one.id, actor="ada")
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")

    assert stock.within(children.take_up, run.org_id, run.id, retry.id) == 3

    assert open_of(stock, retry) == [1, 2]


def test_two_trees_end_while_their_org_is_suspended(postgres: Database) -> None:
    """Whoever ends runs that wait locks them in the order of ids, whatever their tree."""
    stock = Stock(postgres)
    worker = stock.worker()
    one, two = (admitted(stock, worker) for _ in "12")
    stock.change(tables.live_runs, two.id, org_id=one.org_id, definition_id=one.definition_id)
    stock.change(tables.runs, two.id, org_id=one.org_id, definition_id=one.definition_id)
    two = replace(two, org_id=one.org_id, definition_id=one.definition_id)
    [first] = started(stock, two, 1)
    [second] = started(stock, one, 1)
    for run in (one, two):
        stock.finish(worker, stock.ended(run, "failed", reason="error"))
    assert first < second
    row = select(tables.live_runs.c.id).with_for_update()

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as other:
            other.execute(row.where(tables.live_runs.c.id == first)).one()
            ended = pool.submit(stock.within, families.orphan, [one.id, two.id])
            await_lock(postgres)
            other.execute(row.where(tables.live_runs.c.id == second)).one()
        ended.result()

    assert states(stock, [first, second]) == ["cancelled", "cancelled"]


def test_a_child_that_a_retry_has_taken_up_does_not_end_with_its_first_parent(
    stock: Stock, worker: WorkerId
) -> None:
    """Another child of that is being cancelled, so a look still finds it."""
    run = admitted(stock, worker)
    started(stock, run, 2)
    left, taken = stock.admit(worker)
    stock.finish(worker, replace(stock.ended(run, "failed"), reason="error"))
    cancel(stock.database, left.id, actor="ada")
    retry = stock.running(worker, run.org_id, run.definition_id, retry_of=run.id, origin="retry")
    assert stock.within(children.take_up, run.org_id, run.id, retry.id) == 1
    below = started(stock, taken, 2)

    look(stock)

    assert states(stock, below) == ["waiting"] * 2


def test_families_go_on_while_their_org_is_suspended(postgres: Database) -> None:
    """A parent goes on, and the map of an older one starts its next child, which another has locked."""
    stock = Stock(postgres)
    worker = stock.worker()
    org = stock.org(limit=1000)
    definition = stock.definition(org)
    older = stock.running(worker, org, definition)
    started(stock, older, 2, map=1, window=1)
    [first] = stock.admit(worker)
    [held] = [row["id"] for row in stock.all(tables.live_runs) if row["reason"] == "window"]
    newer = stock.running(worker, org, definition)
    started(stock, newer, 1)
    [second] = stock.admit(worker)
    wait(stock, newer, (1, 1))
    park(stock, worker, newer)
    stock.finish(worker, *(of_child(stock.ended(each)) for each in (first, second)))
    row = select(tables.live_runs.c.id).with_for_update()

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as other:
            other.execute(row.where(tables.live_runs.c.id == held)).one()
            settled = pool.submit(stock.within, families.settle, [first.id, second.id])
            for _ in range(40):
                if settled.done():
                    break
                time.sleep(0.025)
            other.execute(row.where(tables.live_runs.c.id == newer.id)).one()
        settled.result()

    look(stock)
    assert states(stock, [newer.id, held]) == ["waiting", "waiting"]


async def test_families_of_a_dead_worker_are_looked_at_while_their_org_is_suspended(
    postgres: Database,
) -> None:
    """A parent that may go on is newer than a child whose parent has failed."""
    stock = Stock(postgres)
    worker = stock.worker()
    org = stock.org(limit=1000)
    definition = stock.definition(org)
    older = stock.running(worker, org, definition)
    [orphan] = started(stock, older, 1)
    stock.put(stock.run(org, definition))
    newer, first = sorted(stock.admit(worker), key=lambda run: run.origin == "child")
    stock.finish(worker, of_child(stock.ended(first, "waiting")))
    [child] = started(stock, newer, 1)
    wait(stock, newer, (1, 1))
    park(stock, worker, newer)
    stock.within(sweeps.end_waiting, ALL_ORGS, [child], state="cancelled", reason="requested")
    stock.finish(worker, stock.ended(older, "failed", reason="error"))
    store = WorkerStore(postgres, worker, timedelta(seconds=30))
    row = select(tables.live_runs.c.id).with_for_update()

    with postgres.transaction() as other:
        other.execute(row.where(tables.live_runs.c.id == orphan)).one()
        looking = asyncio.create_task(store.look_at_families())
        await asyncio.to_thread(await_lock, postgres)
        other.execute(row.where(tables.live_runs.c.id == newer.id)).one()

    assert await looking == 2
    assert states(stock, [newer.id, orphan]) == ["waiting", "cancelled"]


def test_the_many_steps_of_children_go_before_them_a_few_at_a_time(
    stock: Stock, worker: WorkerId, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "PARTS", 3)
    run = admitted(stock, worker)
    started(stock, run, 2)
    two = stock.admit(worker)
    for each in two:
        stock.hot("store_steps", [step_of(each, seq) for seq in range(1, 6)])
    finish(stock, worker, two)
    stock.finish(worker, replace(stock.ended(run), has_children=True))
    clock.advance(timedelta(days=30))
    week, left = timedelta(days=7), []

    while stock.within(sweeps.forget_trees, "succeeded", week, runs=500, limit=500) == 500:
        left.append(len(stock.all(tables.steps)))

    assert left == [7, 4, 1, 0][: len(left)]
    assert len(left) >= 3
    assert len(stock.all(tables.runs)) == 1
