"""Deadlines: what must be done by a time is late once it has passed, until it is done."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from worker.ids import ALL_ORGS, DefinitionId, new_id
from worker.model.runs.run import NewDeadline, NewRun, NewSkip
from worker.store import deadlines, firing, sweeps, tables
from worker.store.database import Database
from worker.store.dialect import driver

HOUR = timedelta(hours=1)
DAY = 24 * HOUR


class Plant:
    """An org with one definition, whose scheduled times are in the past and must be done by now or later."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self.org = stock.org()
        self.definition = stock.definition(self.org)
        self.at = stock.now() - 3 * HOUR

    def run(self, at: datetime | None = None, **values: object) -> NewRun:
        at = at or self.at
        origin = values.pop("origin", "schedule")
        given = {"scheduled_for": at, "available_at": at, "origin": origin} | values
        return self.stock.run(self.org, self.definition, **given)

    def run_stored(self, at: datetime) -> NewRun:
        """A run without a deadline."""
        run = self.run(at)
        self.stock.within(firing.write, [run])
        return run

    def fire(self, until: datetime, at: datetime | None = None, **values: object) -> NewRun:
        """A scheduled time that has become a run, with its deadline."""
        run = self.run(at, **values)
        deadline = NewDeadline(self.definition, self.org, run.scheduled_for, until)
        self.stock.within(firing.write, [run], [], [], [deadline])
        return run

    def end(self, run: NewRun, state: str = "succeeded", reason: str | None = None) -> None:
        self.stock.change(tables.runs, run.id, state=state, reason=reason, finished_at=self.stock.now())

    def passed(self) -> list[deadlines.Late]:
        late, more = self.stock.within(deadlines.pass_due)
        assert not more
        return late

    def done(self) -> list[deadlines.Done]:
        return self.stock.within(deadlines.end_done, [self.definition])

    def late(self) -> list[datetime]:
        return [row["scheduled_for"] for row in self.stock.all(tables.late_definitions)]


@pytest.fixture
def plant(stock: Stock) -> Plant:
    return Plant(stock)


def test_what_is_not_done_by_its_deadline_is_late_once_and_until_it_is_done(plant: Plant) -> None:
    run = plant.fire(plant.at + HOUR)

    [late] = plant.passed()

    assert (late.definition_id, late.scheduled_for) == (plant.definition, plant.at)
    assert (late.deadline_at, late.run, late.why) == (plant.at + HOUR, run.id, "waiting (due)")
    assert (plant.passed(), plant.done(), plant.late()) == ([], [], [plant.at])

    plant.end(run)
    [done] = plant.done()
    assert (done.org, done.definition) == (late.org, late.definition)
    assert (plant.done(), plant.late()) == ([], [])


def test_nothing_is_late_before_its_deadline(plant: Plant) -> None:
    plant.fire(plant.stock.now() + HOUR)

    assert (plant.passed(), plant.late()) == ([], [])
    assert len(plant.stock.all(tables.deadlines)) == 1


def test_a_worker_learns_in_one_query_whether_deadlines_have_passed_and_how_many_are_late(
    plant: Plant,
) -> None:
    def seen() -> tuple[bool, int]:
        found = plant.stock.reading(sweeps.pending)
        return found.deadlines, found.late

    plant.fire(plant.stock.now() + HOUR)
    assert seen() == (False, 0)

    plant.fire(plant.at + HOUR)
    assert seen() == (True, 0)
    plant.passed()
    assert seen() == (False, 1)


def test_what_was_done_in_time_is_not_late_whether_or_not_a_worker_has_looked_since(plant: Plant) -> None:
    seen = plant.fire(plant.at + HOUR)
    plant.end(seen)
    assert plant.done() == []
    assert plant.stock.all(tables.deadlines) == []

    unseen = plant.fire(plant.at + 2 * HOUR, plant.at + HOUR)
    plant.end(unseen)
    assert (plant.passed(), plant.late(), plant.stock.all(tables.deadlines)) == ([], [], [])


@pytest.mark.parametrize(
    ("origin", "hours", "state", "reason", "is_done"),
    [
        ("retry", 0, "succeeded", None, True),
        ("schedule", 1, "succeeded", None, True),
        ("manual", 2, "succeeded", None, True),
        ("backfill", 0, "succeeded", None, True),
        ("schedule", 1, "skipped", "flag_off", True),
        ("retry", -1, "succeeded", None, False),
        ("backfill", -1, "succeeded", None, False),
        ("retry", 0, "failed", "error", False),
        ("retry", 0, "refused", "org_mismatch", False),
        ("manual", 1, "cancelled", "requested", False),
        ("schedule", 1, "skipped", "expired", False),
        ("schedule", 1, "skipped", "overlap", False),
        ("child", 0, "succeeded", None, False),
    ],
)
def test_a_later_success_is_as_good_and_one_of_an_earlier_time_is_not(
    plant: Plant, origin: str, hours: int, state: str, reason: str | None, is_done: bool
) -> None:
    """A flag that is off says that nobody expects the work."""
    failed = plant.fire(plant.at + HOUR)
    plant.end(failed, "failed", "error")
    assert [late.why for late in plant.passed()] == ["failed (error)"]
    backfill = {"backfill_id": new_id()} if origin == "backfill" else {}
    other = plant.run(plant.at + hours * HOUR, origin=origin, **backfill)
    plant.stock.put(other)

    plant.end(other, state, reason)
    plant.done()

    assert (plant.late() == []) is is_done


def test_of_a_definition_that_is_late_the_newest_time_counts(plant: Plant) -> None:
    """Each run of the definition fails, and the success of one that is not the last ends nothing."""
    first = plant.fire(plant.at + HOUR)
    second = plant.fire(plant.at + 2 * HOUR, plant.at + HOUR)
    for run in (first, second):
        plant.end(run, "failed", "error")

    [late] = plant.passed()

    assert (late.scheduled_for, late.deadline_at) == (plant.at + HOUR, plant.at + HOUR)
    third = plant.fire(plant.at + 2 * HOUR + HOUR / 2, plant.at + 2 * HOUR)
    plant.end(third, "failed", "error")
    assert (plant.passed(), plant.late()) == ([], [plant.at + 2 * HOUR])
    [row] = plant.stock.all(tables.late_definitions)
    assert row["late_at"] == plant.at + HOUR

    retry = plant.run(plant.at + HOUR, origin="retry", retry_of=second.id)
    plant.stock.put(retry)
    plant.end(retry)
    assert (plant.done(), plant.late()) == ([], [plant.at + 2 * HOUR])


def test_several_times_with_one_deadline_are_one(plant: Plant) -> None:
    """As with `done_by` and a schedule that fires all night."""
    times = [plant.at + n * timedelta(minutes=1) for n in range(3)]
    for at in times:
        plant.fire(plant.at + HOUR, at)
    [row] = plant.stock.all(tables.deadlines)
    assert row["scheduled_for"] == times[-1]

    both = [NewDeadline(plant.definition, plant.org, at, plant.at + 2 * HOUR) for at in reversed(times)]
    plant.stock.within(deadlines.add, both)
    assert [row["scheduled_for"] for row in plant.stock.all(tables.deadlines)] == [times[-1]] * 2


def test_a_time_that_never_became_a_run_is_late_and_says_why(plant: Plant) -> None:
    skip = NewSkip(plant.org, plant.definition, 1, plant.at, plant.at, 1, "missed")
    deadline = NewDeadline(plant.definition, plant.org, plant.at, plant.at + HOUR)
    plant.stock.within(firing.write, [], [skip], [], [deadline])

    [late] = plant.passed()

    assert (late.run, late.why) == (None, "skipped (missed)")


def test_a_run_that_waits_for_a_person_is_late(plant: Plant) -> None:
    run = plant.fire(plant.at + HOUR)
    plant.stock.change(tables.live_runs, run.id, state="parked", reason="answer")

    assert [late.why for late in plant.passed()] == ["parked (answer)"]


@pytest.mark.parametrize(
    ("change", "is_late"),
    [
        ("definition is closed", False),
        ("definition is disabled", False),
        ("definition is paused", True),
        ("org is suspended", False),
        ("org is removed", False),
        ("org is paused", True),
    ],
)
def test_nothing_is_late_that_nobody_expects_and_a_pause_changes_nothing(
    plant: Plant, change: str, is_late: bool
) -> None:
    plant.fire(plant.at + HOUR)
    stock, (what, _, state) = plant.stock, change.split()
    if what == "org":
        stock.change(tables.orgs, plant.org, state=state)
    elif state == "disabled":
        stock.change(tables.definitions, plant.definition, enabled=False)
    else:
        stock.change(tables.definitions, plant.definition, **{f"{state}_at": stock.now()})

    assert bool(plant.passed()) is is_late
    assert plant.stock.all(tables.deadlines) == []


def test_what_has_passed_is_taken_in_parts(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "BATCH", 2)
    plants = [Plant(stock) for _ in range(5)]
    for number, plant in enumerate(plants):
        plant.fire(plant.at + number * timedelta(minutes=1))

    parts = [stock.within(deadlines.pass_due) for _ in range(3)]

    assert [(len(late), more) for late, more in parts] == [(2, True), (2, True), (1, False)]
    oldest = [late.definition_id for part, _ in parts for late in part]
    assert [set(oldest[:2]), set(oldest[2:4])] == [
        {plant.definition for plant in some} for some in (plants[:2], plants[2:4])
    ]


def test_what_was_done_while_no_worker_looked_is_found_in_pages(
    stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "BATCH", 2)
    plants = [Plant(stock) for _ in range(3)]
    runs = [plant.fire(plant.at + HOUR) for plant in plants]
    while stock.within(deadlines.pass_due)[1]:
        pass
    for plant, run in list(zip(plants, runs, strict=True))[1:]:
        plant.end(run)

    found: list[DefinitionId] = []
    after: DefinitionId | None = None
    while True:
        checked = stock.reading(deadlines.check, after)
        found += checked.done
        after = checked.next
        if after is None:
            break

    assert set(found) == {plant.definition for plant in plants[1:]}
    assert len(stock.within(deadlines.end_done, found)) == 2
    assert [row["definition_id"] for row in stock.all(tables.late_definitions)] == [plants[0].definition]


def test_what_can_no_longer_be_retried_is_forgotten(plant: Plant, clock: ManualClock) -> None:
    run = plant.fire(plant.at + HOUR)
    plant.passed()
    # It still waits, however long that takes.
    assert plant.stock.within(deadlines.forget_late, HOUR, limit=10) == 0

    plant.end(run, "failed", "error")
    with plant.stock.database.transaction() as connection:
        connection.execute(tables.live_runs.delete())

    assert plant.stock.within(deadlines.forget_late, DAY, limit=10) == 0
    assert plant.stock.within(deadlines.forget_late, HOUR, limit=10) == 1
    assert plant.late() == []


def test_each_definition_that_is_late_has_its_own_reason(stock: Stock) -> None:
    early, missed = Plant(stock), Plant(stock)
    early.end(early.fire(early.at + HOUR), "failed", "error")
    # A run of the second definition has succeeded, for a time before the one that was missed.
    missed.end(missed.run_stored(missed.at + HOUR))
    last = missed.at + 2 * HOUR
    stock.within(deadlines.add, [NewDeadline(missed.definition, missed.org, last, last)])

    found = {late.definition_id: late for late in early.passed()}

    assert found[early.definition].why == "failed (error)"
    assert (found[missed.definition].why, found[missed.definition].run) == ("skipped", None)


def test_the_deadlines_of_one_org_are_its_own(stock: Stock) -> None:
    mine, other = Plant(stock), Plant(stock)
    mine.fire(mine.at + HOUR)
    both = [mine.definition, other.definition]

    assert stock.reading(deadlines.is_any, mine.org)
    assert not stock.reading(deadlines.is_any, other.org)
    assert stock.reading(deadlines.is_any, ALL_ORGS)
    assert stock.reading(deadlines.stored, other.org, both) == []
    [found] = stock.reading(deadlines.stored, mine.org, both)
    assert (found.deadline_at, found.is_late) == (mine.at + HOUR, False)

    mine.passed()
    [found] = stock.reading(deadlines.stored, ALL_ORGS, both)
    assert found.is_late
    stock.within(deadlines.drop, [found])
    assert not stock.reading(deadlines.is_any, ALL_ORGS)


def test_each_look_goes_by_an_index(plant: Plant) -> None:
    """However many definitions there are: it reads what has passed, and rows of those definitions."""
    asked: dict[str, Any] = {}

    def note(connection: Any, cursor: Any, statement: str, values: Any, context: Any, many: bool) -> None:
        if re.search(r"deadlines|late_definitions", statement) or re.search(r"FROM runs", statement):
            asked[statement] = values[0] if many else values

    stock = plant.stock
    run = plant.fire(plant.at + HOUR)
    event.listen(Engine, "before_cursor_execute", note)
    try:
        plant.passed()
        stock.reading(deadlines.check)
        plant.end(run)
        plant.done()
        stock.reading(sweeps.pending)
        stock.within(deadlines.forget_late, DAY, limit=10)
    finally:
        event.remove(Engine, "before_cursor_execute", note)

    is_postgresql = stock.database.dialect == "postgresql"
    with stock.database.transaction() as connection:
        if is_postgresql:
            # The tables are nearly empty: else it would read the one page that they have.
            connection.execute(text("SET LOCAL enable_seqscan = off"))
        for statement, values in asked.items():
            explain = "EXPLAIN (COSTS OFF) " if is_postgresql else "EXPLAIN QUERY PLAN "
            plan = "\n".join(str(row) for row in driver(connection).execute(explain + statement, values))
            whole = r"Seq Scan on (deadlines|runs|definitions|skips|live_runs)"
            whole += r"|SCAN (deadlines|runs|definitions|skips|live_runs)(?! USING (COVERING )?INDEX)"
            assert not re.search(whole, plan), f"{statement}\n{plan}"
    assert len(asked) > 8


def test_two_workers_that_look_at_once_find_each_definition_once(postgres: Database) -> None:
    stock = Stock(postgres)
    plants = [Plant(stock) for _ in range(40)]
    for plant in plants:
        # Two deadlines of a definition, of which each worker may take one.
        plant.fire(plant.at + HOUR)
        plant.fire(plant.at + HOUR + HOUR / 2, plant.at + HOUR / 2)

    def look() -> list[deadlines.Late]:
        found, more = [], True
        while more:
            late, more = stock.within(deadlines.pass_due)
            found += late
        return found

    deadlines_before = deadlines.BATCH
    deadlines.BATCH = 7
    try:
        with ThreadPoolExecutor(2) as pool:
            looks = [pool.submit(look) for _ in range(2)]
            found = [late.definition_id for each in looks for late in each.result()]
            found += [late.definition_id for late in look()]
    finally:
        deadlines.BATCH = deadlines_before

    assert sorted(found) == sorted(plant.definition for plant in plants)
    rows = stock.all(tables.late_definitions)
    assert {row["definition_id"]: row["scheduled_for"] for row in rows} == {
        plant.definition: plant.at + HOUR / 2 for plant in plants
    }
