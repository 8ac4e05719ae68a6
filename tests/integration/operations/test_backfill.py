"""Backfill: every instant of a range of the past becomes one run, never more at once than asked."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta

import pytest

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from tests.fakes.site import one_definition
from tests.integration.operations.conftest import whole_hour
from worker.errors import Conflict, NotFound, UsageError
from worker.ids import ALL_ORGS
from worker.operations.backfill import Filled, backfill, cancel_backfill, fill_backfills
from worker.operations.chores import Chores
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.store import firing
from worker.store.database import Database
from worker.store.lists import BACKFILLS, Page
from worker.store.lists.read import read

HOUR = timedelta(hours=1)
FILE = one_definition(schedule="every 1h", priority=3)


@pytest.fixture
def now(apply, rows):
    """The present hour, with a definition of every hour."""
    apply(FILE)
    return whole_hour(rows.now())


def ask(database, start, until, **options):
    return backfill(database, "org_acme", "digest", start=start, until=until, actor="tester", **options)


def waiting(rows):
    return [run["scheduled_for"] for run in rows.live_runs]


def end_waiting(rows):
    for run in rows.live_runs:
        rows.set_ended(run["id"], "succeeded", None)


def carry_on(database, rows):
    """Runs end one batch after the other until the backfill has."""
    for _ in range(100):
        end_waiting(rows)
        if fill_backfills(database).ended:
            return
    raise AssertionError("the backfill never ended")


def test_each_instant_of_the_half_open_range_runs_once_one_after_the_other(database, rows, now):
    shown = ask(database, now - 5 * HOUR, now - 2 * HOUR)

    assert (shown["state"], shown["instants"], shown["made"], shown["ended"]) == ("running", 3, 1, 0)
    assert waiting(rows) == [now - 5 * HOUR]
    assert fill_backfills(database).runs == 0
    carry_on(database, rows)
    runs = sorted(rows.runs, key=lambda run: run["id"])
    assert [run["scheduled_for"] for run in runs] == [now - n * HOUR for n in (5, 4, 3)]
    assert {(run["origin"], run["created_by"], run["revision"]) for run in runs} == {
        ("backfill", "tester", 1)
    }
    (row,) = rows.backfills
    assert (row["made"], row["next_scheduled_for"]) == (3, None)
    assert row["finished_at"] is not None


def test_its_runs_are_its_own_lane(database, rows, now):
    """Beside a run of the definition, whatever its overlap says, and with its priority."""
    run_now(database, "org_acme", "digest", actor="tester")

    ask(database, now - 3 * HOUR, now)

    by_hand, of_backfill = sorted(rows.live_runs, key=lambda run: run["origin"], reverse=True)
    assert (by_hand["origin"], by_hand["serial"]) == ("manual", True)
    assert (of_backfill["serial"], of_backfill["priority"]) == (False, 3)
    assert of_backfill["available_at"] > of_backfill["scheduled_for"]
    assert of_backfill["start_by"] is None


def test_as_many_are_unfinished_at_once_as_asked(database, rows, now):
    ask(database, now - 10 * HOUR, now, limit=4)

    assert len(rows.live_runs) == 4
    rows.set_ended(rows.live_runs[0]["id"], "failed")
    fill_backfills(database)
    assert len(rows.live_runs) == 4
    assert rows.backfills[0]["made"] == 5


def test_the_same_range_again_adds_nothing(database, rows, now):
    first = ask(database, now - 3 * HOUR, now)
    again = ask(database, now - 3 * HOUR, now)
    assert again["id"] == first["id"]
    carry_on(database, rows)

    after = ask(database, now - 3 * HOUR, now)

    assert (after["id"], after["state"]) == (first["id"], "done")
    assert fill_backfills(database).runs == 0
    assert len(rows.runs) == 3
    assert len([entry for entry in rows.audit if entry["action"] == "definition.backfill"]) == 1


@on_either
def test_a_cancelled_backfill_stops_and_goes_on_when_it_is_asked_for_again(database, rows, now):
    ask(database, now - 4 * HOUR, now, limit=2)

    stopped = cancel_backfill(database, "org_acme", "digest", start=now - 4 * HOUR, until=now, actor="tester")

    assert (stopped["state"], stopped["made"], stopped["ended"]) == ("cancelled", 2, 2)
    assert {run["reason"] for run in rows.runs} == {"requested"}
    assert fill_backfills(database).runs == 0
    with pytest.raises(Conflict, match="has ended"):
        cancel_backfill(database, "org_acme", "digest", start=now - 4 * HOUR, until=now, actor="tester")
    with pytest.raises(NotFound):
        cancel_backfill(database, "org_acme", "digest", start=now - 3 * HOUR, until=now, actor="tester")

    ask(database, now - 4 * HOUR, now, limit=2)
    carry_on(database, rows)
    assert sorted(run["scheduled_for"] for run in rows.runs) == [now - n * HOUR for n in (4, 3, 2, 1)]


async def test_a_worker_that_drains_reports_a_backfill_that_has_ended(
    database, rows, now, emitted, monkeypatch
):
    ask(database, now - HOUR, now)
    end_waiting(rows)
    chores, draining = Chores(database, on_runs=lambda: None), threading.Event()
    stored = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fill(database: Database) -> Filled:
        filled = fill_backfills(database)
        loop.call_soon_threadsafe(stored.set)
        draining.wait(10)
        return filled

    monkeypatch.setattr("worker.operations.chores.fill_backfills", fill)
    task = asyncio.create_task(chores.backfills())
    chores._backfill_waits.set()
    await stored.wait()
    task.cancel()
    await asyncio.sleep(0)
    draining.set()
    await asyncio.gather(task, return_exceptions=True)

    assert [one.fields["definition"] for one in emitted if one.event.name == "backfill.ended"] == ["digest"]


def test_a_million_instants_are_counted_and_not_made(apply, database, rows, now):
    apply(FILE.replace("every 1h", "every 1s"))

    shown = ask(database, now - timedelta(seconds=1_000_000), now, limit=3)

    assert (shown["instants"], shown["made"]) == (1_000_000, 3)
    assert len(rows.runs) == 3


@pytest.mark.feature("calendars")
def test_the_dates_of_the_calendar_do_not_run(apply, database, rows, now):
    """Neither are they counted: the range has only what it runs."""
    first = now - 30 * HOUR
    holiday = first.date()
    apply(f'[[calendar]]\nname = "holidays"\ndates = ["{holiday}"]\n' + FILE + 'calendar = "holidays"\n')
    left = [at for n in range(30) if (at := first + n * HOUR).date() != holiday]

    shown = ask(database, first, now, limit=50)

    assert (shown["instants"], shown["made"]) == (len(left), len(left))
    assert sorted(run["scheduled_for"] for run in rows.runs) == left


def test_starts_at_does_not_count_and_the_revision_stays(apply, database, rows, now):
    apply(FILE + f'starts_at = "{now.isoformat()}"\n')
    ask(database, now - 2 * HOUR, now)

    apply(FILE.replace("every 1h", "every 30m"))
    carry_on(database, rows)

    backfilled = [run for run in rows.runs if run["origin"] == "backfill"]
    assert [run["scheduled_for"] for run in backfilled] == [now - 2 * HOUR, now - HOUR]
    assert {run["revision"] for run in backfilled} == {2}


@on_either
def test_a_closed_definition_and_a_suspended_org_end_or_hold_it(database, rows, now):
    ask(database, now - 3 * HOUR, now)

    set_org_state(database, "org_acme", "suspended", actor="tester")
    assert fill_backfills(database).runs == 0
    with pytest.raises(Conflict, match="is suspended"):
        ask(database, now - 9 * HOUR, now)
    set_org_state(database, "org_acme", "active", actor="tester")
    assert fill_backfills(database).runs == 1

    close_definition(database, "org_acme", "digest", actor="tester")
    assert rows.backfills[0]["cancelled_at"] is not None
    assert rows.live_runs == []
    with pytest.raises(Conflict, match="is closed"):
        ask(database, now - 3 * HOUR, now)


@on_either
@pytest.mark.parametrize("state", ["suspended", "removed"])
def test_an_org_is_suspended_while_a_worker_makes_its_next_runs(
    database, migrated_url, clock, rows, now, state, monkeypatch
):
    ask(database, now - 4 * HOUR, now)
    end_waiting(rows)
    other = Database.open(migrated_url, clock=clock)
    write = firing.write

    def suspend(connection, runs):
        write(connection, runs)
        suspended.append(pool.submit(set_org_state, other, "org_acme", state, actor="tester"))
        wait(suspended, timeout=0.5)

    monkeypatch.setattr(firing, "write", suspend)
    suspended = []
    try:
        with ThreadPoolExecutor(1) as pool:
            assert fill_backfills(database).runs == 1
            suspended[0].result()
    finally:
        other.close()

    assert rows.live_runs == []


@pytest.mark.parametrize(
    ("start", "until", "limit", "problem"),
    [
        (2, 2, 1, "is empty"),
        (1, 2, 1, "is empty"),
        (1, -1, 1, "ends in the future"),
        (3, 2, 0, "limit 0"),
        (3, 2, 1001, "limit 1001"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(database, rows, now, start, until, limit, problem):
    with pytest.raises(UsageError, match=problem):
        ask(database, now - start * HOUR, now - until * HOUR, limit=limit)
    assert rows.backfills == []


def test_a_range_without_an_instant_is_refused(database, now):
    with pytest.raises(UsageError, match="no scheduled time"):
        ask(database, now - HOUR + timedelta(minutes=1), now - timedelta(minutes=1))


@on_either
def test_workers_that_fill_at_once_never_exceed_the_limit(database, migrated_url, clock, rows, now):
    ask(database, now - 40 * HOUR, now, limit=3)
    other = Database.open(migrated_url, clock=clock)
    try:
        for _ in range(8):
            end_waiting(rows)
            with ThreadPoolExecutor(2) as pool:
                for filled in [pool.submit(fill_backfills, each) for each in (database, other)]:
                    filled.result()
            assert len(rows.live_runs) == 3
    finally:
        other.close()
    instants = [run["scheduled_for"] for run in rows.runs]
    assert len(instants) == len(set(instants)) == 27


@on_either
def test_lists_say_how_far_it_is(database, rows, now):
    ask(database, now - 4 * HOUR, now, limit=2)
    rows.set_ended(rows.live_runs[0]["id"], "succeeded", None)

    with database.autocommit() as connection:
        (shown,) = read(connection, BACKFILLS, "org_acme", Page(definition="digest"))
        (of_all,) = read(connection, BACKFILLS, ALL_ORGS)
        assert read(connection, BACKFILLS, ALL_ORGS, Page(definition="other")) == []

    assert shown == of_all
    assert (shown["org"], shown["definition"], shown["limit"]) == ("org_acme", "digest", 2)
    assert (shown["instants"], shown["made"], shown["ended"]) == (4, 2, 1)
