"""Parked runs: they wait without a process, go on at the first event, and miss none, on both databases."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock
from worker.ids import ALL_ORGS, WorkerId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import NewWait, WaitState
from worker.store import edit_runs, sweeps, tables, waits
from worker.store.lists.grid import open_waits
from worker.store.lists.morning import waiting
from worker.store.sql import statements

DAY = 86_400.0


@pytest.fixture
def worker(stock: Stock) -> WorkerId:
    return stock.worker()


def admitted(stock: Stock, worker: WorkerId, **values: Any) -> AdmittedRun:
    org = stock.org()
    return stock.running(worker, org, stock.definition(org), **values)


def open_wait(stock: Stock, run: AdmittedRun, name: str = "approval", **values: Any) -> WaitState | None:
    wait = NewWait(name, values.pop("occurrence", 1), values.pop("kind", "answer"), **values)
    return stock.hot("open_wait", run.id, run.fencing_token, attempt=run.attempt, wait=wait)


def parked(stock: Stock, run: AdmittedRun, reason: str = "answer", **values: Any) -> EndedAttempt:
    end = stock.ended(run, "parked", outcome="parked", reason=reason)
    return replace(end, **values)


def give(stock: Stock, run: AdmittedRun, data: Any, name: str = "approval") -> bool:
    """Answer as the operation does: lock the run, write the wait, wake the run."""
    with stock.database.transaction() as connection:
        at = stock.database.now(connection)
        attempt = waits.lock_attempt(connection, run.org_id, run.id)
        found = waits.find(connection, run.org_id, run.id, name, 1)
        if found is None:
            waits.answer_early(connection, run.org_id, run.id, name, 1, data, at=at, by="kim")
            return False
        waits.answer(connection, found, data, at=at, by="kim")
        return found["pending_attempt"] == attempt and waits.wake(connection, run.org_id, run.id, at=at)


def wake_due(stock: Stock) -> int:
    return stock.within(sweeps.wake_due)


def test_a_parked_run_leaves_its_slot_and_waits(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker, start_by=stock.now() + timedelta(hours=1))
    assert open_wait(stock, run, seconds=DAY) == WaitState(
        "answer", "pending", None, stock.all(tables.waits)[0]["until"]
    )

    assert stock.finish(worker, parked(stock, run)) == {run.id}

    live = stock.unended(run.id)
    assert (live["state"], live["reason"]) == ("parked", "answer")
    assert (live["worker_id"], live["started_at"], live["start_by"]) == (None, None, None)
    assert live["available_at"] == stock.all(tables.waits)[0]["until"]
    assert [row["outcome"] for row in stock.attempts(run.id)] == ["parked"]
    assert stock.admit(worker) == []


def test_writing_a_park_twice_is_accepted_and_changes_nothing(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run))
    before = stock.live(run.id)

    assert stock.finish(worker, parked(stock, run)) == {run.id}

    assert stock.live(run.id) == before


def test_an_answer_wakes_a_parked_run(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run))

    assert give(stock, run, {"yes": True})

    [again] = stock.admit(worker)
    assert (again.id, again.attempt, again.failures) == (run.id, 2, 0)
    state = open_wait(stock, again)
    assert state is not None
    assert (state.state, state.answer_json) == ("answered", '{"yes":true}') or (
        state.answer_json == '{"yes": true}'
    )


def test_an_answer_before_the_park_is_written_is_not_missed(stock: Stock, worker: WorkerId) -> None:
    """Without the look at the waits after the lock, the run would sleep until its deadline."""
    run = admitted(stock, worker)
    open_wait(stock, run, seconds=DAY)
    assert not give(stock, run, "yes")

    stock.finish(worker, parked(stock, run))

    live = stock.unended(run.id)
    assert (live["state"], live["reason"]) == ("waiting", "resumed")
    assert [each.id for each in stock.admit(worker)] == [run.id]


def test_an_answer_to_a_wait_of_an_earlier_attempt_does_not_wake(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, "first")
    stock.finish(worker, stock.ended(run, "waiting"))
    stock.make_available(run.id)
    [again] = stock.admit(worker)
    open_wait(stock, again, "second")
    stock.finish(worker, parked(stock, again))

    assert not give(stock, again, "yes", "first")

    assert stock.unended(run.id)["state"] == "parked"


def test_a_deadline_that_passes_wakes(stock: Stock, worker: WorkerId, clock: ManualClock) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, "sleep", kind="sleep", seconds=60.0)
    stock.finish(worker, parked(stock, run, "asleep"))
    assert wake_due(stock) == 0

    stock.change(tables.waits, run.id, until=stock.now() - timedelta(seconds=1))
    stock.change(tables.live_runs, run.id, available_at=stock.now() - timedelta(seconds=1))

    assert wake_due(stock) == 1
    [again] = stock.admit(worker)
    state = open_wait(stock, again, "sleep", kind="sleep", seconds=60.0)
    assert state is not None and state.state == "over"


def test_a_wait_that_is_over_stays_so_when_the_clock_goes_back(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, seconds=60.0)
    stock.change(tables.waits, run.id, until=stock.now() - timedelta(seconds=1))
    first = open_wait(stock, run, seconds=60.0)
    stock.change(tables.waits, run.id, until=stock.now() + timedelta(hours=1))

    again = open_wait(stock, run, seconds=60.0)

    assert first is not None and again is not None
    assert (first.state, again.state) == ("over", "over")


def test_the_deadline_of_the_first_call_stays(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    first = open_wait(stock, run, seconds=60.0, ask_json='{"n":1}')
    again = open_wait(stock, run, seconds=DAY, ask_json='{"n":2}')

    assert first is not None and again is not None
    assert again.until == first.until
    assert stock.all(tables.waits)[0]["ask"] == {"n": 1}


@pytest.mark.parametrize(
    ("data", "text"), [(None, None), (7, "7"), (1.5, "1.5"), (True, "true"), ("7", '"7"'), ([1], "[1]")]
)
def test_an_early_answer_is_kept(stock: Stock, worker: WorkerId, data: Any, text: str | None) -> None:
    run = admitted(stock, worker)
    give(stock, run, data)

    state = open_wait(stock, run, seconds=60.0)

    assert state is not None
    assert (state.state, state.answer_json) == ("answered", text)


def test_a_park_whose_deadline_has_passed_goes_on_at_once(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, seconds=60.0)
    stock.change(tables.waits, run.id, until=stock.now() - timedelta(seconds=1))

    stock.finish(worker, parked(stock, run))

    assert [each.id for each in stock.admit(worker)] == [run.id]


def test_a_wait_that_was_over_before_does_not_wake(stock: Stock, worker: WorkerId) -> None:
    """Each attempt opens it again: it would go round for ever."""
    run = admitted(stock, worker)
    open_wait(stock, run, "slept", kind="sleep", seconds=0.0)
    open_wait(stock, run, "slept-longer", kind="sleep", seconds=60.0)
    stock.change(tables.waits, run.id, until=stock.now() - timedelta(seconds=1))
    open_wait(stock, run, "slept-longer", kind="sleep", seconds=60.0)
    open_wait(stock, run, "answered")
    give(stock, run, 1, "answered")
    open_wait(stock, run, "answered")
    open_wait(stock, run, "approval", seconds=DAY)

    stock.finish(worker, parked(stock, run))

    assert stock.unended(run.id)["state"] == "parked"


def test_the_first_of_several_deadlines_counts(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, "a", seconds=DAY)
    soon = open_wait(stock, run, "b", seconds=60.0)
    open_wait(stock, run, "c")

    stock.finish(worker, parked(stock, run))

    live = stock.live(run.id)
    assert soon is not None and live is not None and live["available_at"] == soon.until


def test_a_fenced_attempt_opens_nothing_and_parks_nothing(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    late = replace(run, fencing_token=run.fencing_token - 1)

    assert open_wait(stock, late) is None
    assert stock.finish(worker, parked(stock, late)) == set()
    assert stock.all(tables.waits) == []


def test_a_parked_run_takes_no_writes_of_its_last_attempt(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run))

    with stock.database.transaction() as connection:
        hot = statements(connection)
        saved = hot.save_checkpoint(connection, run, HANDLER, "1")
    assert not saved
    assert open_wait(stock, run, "other") is None


def test_a_run_that_was_cancelled_meanwhile_ends_instead(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.change(tables.live_runs, run.id, cancel_requested_at=stock.now(), cancel_reason="requested")

    stock.finish(worker, parked(stock, run))

    assert (stock.stored(run.id)["state"], stock.stored(run.id)["reason"]) == ("cancelled", "requested")


def test_a_parked_run_is_cancelled_like_a_waiting_one(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run))

    stock.within(edit_runs.end_waiting, run.org_id, edit_runs.is_run(run.id), reason="requested")

    assert stock.stored(run.id)["state"] == "cancelled"
    assert stock.live(run.id) is None


def test_a_parked_run_is_unfinished_for_overlap(stock: Stock, worker: WorkerId) -> None:
    org = stock.org()
    definition = stock.definition(org)
    run = stock.running(worker, org, definition, serial=True)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run))
    behind = stock.run(org, definition, serial=True, overlap="queue_one")
    stock.put(behind)

    assert stock.within(sweeps.promote_held) == 0
    assert stock.unended(behind.id)["state"] == "held"

    give(stock, run, "yes")
    [again] = stock.admit(worker)
    stock.finish(worker, stock.ended(again))
    assert [each.id for each in stock.admit(worker)] == [behind.id]


@pytest.mark.parametrize("counted", [False, True])
def test_a_parked_run_counts_against_limits_only_if_asked_to(
    stock: Stock, worker: WorkerId, counted: bool
) -> None:
    org = stock.org()
    definition = stock.definition(org)
    run = stock.running(worker, org, definition, max_concurrent=1)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run, counted=counted))
    same, other = stock.run(org, definition, max_concurrent=1), stock.run(org)
    stock.put(same, other)

    of_handler = stock.admit(worker, offered={HANDLER: 1})
    assert len(of_handler) == (0 if counted else 1)
    of_definition = {each.id for each in stock.admit(worker)} | {each.id for each in of_handler}
    assert of_definition == ({other.id} if counted else {same.id, other.id})


def test_a_park_forgets_losses_and_keeps_failures(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run, failures=2, recoveries=0))

    live = stock.live(run.id)
    assert live is not None and (live["failures"], live["recoveries"]) == (2, 0)


def test_a_batch_with_parks_waits_and_ends_writes_each(stock: Stock, worker: WorkerId) -> None:
    org = stock.org()
    stock.put(*(stock.run(org) for _ in range(4)))
    first, second, third, fourth = stock.admit(worker)
    open_wait(stock, first, seconds=60.0)
    open_wait(stock, second)
    give(stock, second, "early enough")

    ends = (parked(stock, first), parked(stock, second), stock.ended(third, "waiting"), stock.ended(fourth))
    assert stock.finish(worker, *ends) == {first.id, second.id, third.id, fourth.id}

    states = {row["id"]: row["state"] for row in stock.all(tables.live_runs)}
    assert states == {first.id: "parked", second.id: "waiting", third.id: "waiting"}
    assert stock.stored(fourth.id)["state"] == "succeeded"
    [day] = stock.all(tables.rollup_days)
    assert (day["runs"], day["attempts"]) == (1, 4)


def test_a_retry_gets_answers_and_ended_sleeps_but_not_what_timed_out(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, "answered")
    give(stock, run, 7, "answered")
    open_wait(stock, run, "late", seconds=0.0)
    open_wait(stock, run, "sleep", kind="sleep", seconds=0.0)
    open_wait(stock, run, "open")
    to = stock.run(run.org_id)
    stock.put(to)

    stock.within(waits.copy, run.org_id, run.id, to.id)

    copied = stock.all(tables.waits, tables.waits.c.run_id == to.id)
    assert [(row["name"], row["answer"]) for row in copied] == [("answered", 7), ("sleep", None)]


def test_too_many_waits_are_refused(stock: Stock, worker: WorkerId, monkeypatch: pytest.MonkeyPatch) -> None:
    for dialect in ("postgresql", "sqlite"):
        monkeypatch.setattr(f"worker.store.sql.{dialect}.steps.MAX_WAITS", 2)
    run = admitted(stock, worker)

    states = [open_wait(stock, run, occurrence=number) for number in (1, 2, 3, 2)]

    assert [state and state.state for state in states] == ["pending", "pending", "too_many", "pending"]
    assert len(stock.all(tables.waits)) == 2


def test_the_page_of_an_org_lists_parked_runs_after_waiting_ones(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run)
    stock.finish(worker, parked(stock, run))
    next_one = stock.run(run.org_id, run.definition_id)
    stock.put(next_one)

    with stock.database.autocommit() as connection:
        found = open_waits(connection, run.org_id, limit=5)
        [answer, due] = sorted(waiting(connection, ALL_ORGS), key=lambda row: row.reason)

    assert {row["id"]: row["reason"] for row in found} == {next_one.id: "due", run.id: "answer"}
    assert (answer.reason, answer.runs, due.reason, due.runs) == ("answer", 1, "due", 1)


def refused(stock: Stock, run: AdmittedRun) -> list[Any]:
    return [row["refused"] for row in stock.all(tables.waits, tables.waits.c.run_id == run.id)]


def test_the_options_of_the_first_call_stay(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, options=("yes", "no"))
    open_wait(stock, run, options=("maybe",))
    open_wait(stock, run)
    open_wait(stock, run, "free")
    open_wait(stock, run, "free", options=("yes",))

    rows = {row["name"]: (row["options"], row["refused"]) for row in stock.all(tables.waits)}
    assert rows == {"approval": (["yes", "no"], None), "free": (None, None)}


@pytest.mark.parametrize(
    ("options", "data"),
    [
        (("yes", "no"), "yes"),
        ((True, False), False),
        ((1, 2.5), 1),
        ((1, 2.5), 2.5),
        (("1", None), None),
        (("7", "8"), "7"),
        (("é☃", "x"), "é☃"),
    ],
)
def test_an_early_answer_among_the_options_is_taken(
    stock: Stock, worker: WorkerId, options: Any, data: Any
) -> None:
    run = admitted(stock, worker)
    give(stock, run, data)

    state = open_wait(stock, run, options=options)

    assert state is not None and state.state == "answered"
    assert (None if state.answer_json is None else json.loads(state.answer_json)) == data
    assert refused(stock, run) == [None]


@pytest.mark.parametrize(
    ("options", "data"),
    [
        (("yes", "no"), "maybe"),
        (("yes", "no"), ["yes"]),
        (("yes", "no"), {"yes": True}),
        (("yes", "no"), None),
        ((1, 0), True),
        ((True,), 1),
        (("7",), 7),
        ((7,), "7"),
    ],
)
def test_an_early_answer_that_is_no_option_is_kept_and_not_taken(
    stock: Stock, worker: WorkerId, options: Any, data: Any
) -> None:
    """The wait stays open, so the run is not stuck. The control is a wait without options, which takes it."""
    run = admitted(stock, worker)
    give(stock, run, data)
    give(stock, run, data, "free")

    state, free = open_wait(stock, run, options=options), open_wait(stock, run, "free")

    assert state is not None and (state.state, state.answer_json) == ("pending", None)
    assert free is not None and free.state == "answered"
    rows = {row["name"]: row for row in stock.all(tables.waits)}
    assert (rows["approval"]["refused"], rows["free"]["refused"]) == ({"answer": data}, None)
    assert rows["approval"]["answered_at"] is rows["approval"]["answered_by"] is None
    stock.finish(worker, parked(stock, run))
    assert stock.unended(run.id)["state"] == "parked"

    assert give(stock, run, options[0])
    [again] = stock.admit(worker)
    state = open_wait(stock, again, options=options)
    assert state is not None and state.state == "answered"


def test_an_answer_that_the_previous_release_took_is_not_handed_to_the_handler(
    stock: Stock, worker: WorkerId
) -> None:
    """Its console knows no options. The run asks again, until somebody gives one of them."""
    run = admitted(stock, worker)
    open_wait(stock, run, options=("yes", "no"))
    stock.finish(worker, parked(stock, run))
    assert give(stock, run, "maybe")
    [again] = stock.admit(worker)

    state = open_wait(stock, again, options=("yes", "no"))
    stock.finish(worker, parked(stock, again))

    assert state is not None and state.state == "pending"
    assert stock.unended(run.id)["state"] == "parked"
    assert refused(stock, run) == [{"answer": "maybe"}]
    assert give(stock, again, "no")


def test_a_refused_answer_does_not_outlive_the_deadline(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, options=("yes",), seconds=60.0)
    give(stock, run, "maybe")
    stock.change(tables.waits, run.id, until=stock.now() - timedelta(seconds=1))

    state = open_wait(stock, run, options=("yes",), seconds=60.0)

    assert state is not None and state.state == "over"
    assert refused(stock, run) == [{"answer": "maybe"}]


def test_a_retry_keeps_the_options_of_what_was_answered(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, options=("yes", "no"))
    give(stock, run, "yes")
    to = stock.run(run.org_id)
    stock.put(to)

    stock.within(waits.copy, run.org_id, run.id, to.id)

    [copied] = stock.all(tables.waits, tables.waits.c.run_id == to.id)
    assert (copied["options"], copied["answer"]) == (["yes", "no"], "yes")


def test_open_questions_are_what_somebody_can_answer_now(stock: Stock, worker: WorkerId) -> None:
    run = admitted(stock, worker)
    open_wait(stock, run, "slept", kind="sleep", seconds=60.0)
    open_wait(stock, run, "budget:quiet", kind="budget", seconds=60.0)
    give(stock, run, 1, "early")
    open_wait(stock, run, "late", seconds=0.0)
    open_wait(stock, run, "given")
    give(stock, run, 1, "given")

    def found(after: float = 0.0) -> list[str]:
        with stock.database.autocommit() as connection:
            at = stock.database.now(connection) + timedelta(seconds=after)
            return [row["name"] for row in waits.open_questions(connection, run.org_id, run.id, at=at)]

    assert found() == []
    open_wait(stock, run, "approval", seconds=60.0)
    open_wait(stock, run, "budget:tokens", kind="budget", ask_json="{}")
    assert found() == ["approval", "budget:tokens"]
    assert found(after=61.0) == ["budget:tokens"]
