"""An edit, a firing and a run by hand at the same moment: each instant is still counted once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from tests.conftest import on_either
from tests.fakes.site import one_definition
from worker.errors import Conflict
from worker.model.definitions.file import parse_file
from worker.model.runs.fire import decide
from worker.model.runs.run import Declared
from worker.operations.apply import apply as apply_file
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.store import firing
from worker.store.database import Database

pytestmark = on_either

TICK = timedelta(minutes=10)

FILE = one_definition(schedule="every 10m", spread="off")


@pytest.fixture
def other(migrated_url, clock, database):
    """Another process's way into the same database."""
    opened = Database.open(migrated_url, clock=clock)
    yield opened
    opened.close()


def in_a_child(due, now):
    return decide(due, now, lambda _: Declared())


def test_an_edit_waits_for_a_firing_under_way_and_settles_only_what_is_left(apply, database, other, rows):
    apply(FILE)
    rows.make_due_since(rows.schedule[0]["next_scheduled_for"] - 6 * TICK)
    edited = threading.Event()
    fired = []

    def decide_slowly(due, now):
        editing.submit(edit)
        assert not edited.wait(0.3), "the edit did not wait for the firing"
        return in_a_child(due, now)

    def edit():
        apply_file(other, parse_file(FILE.replace("every 10m", "every 1h")), actor="other")
        edited.set()

    with ThreadPoolExecutor(1) as editing:
        with database.transaction() as connection:
            fired.append(firing.fire(connection, decide_slowly, limit=10, specs={}))
        assert edited.wait(10)

    assert len(fired[0].inserted) == 1
    assert [run["revision"] for run in rows.runs] == [1]
    assert 1 + sum(skip["count"] for skip in rows.skips) == 6
    assert rows.schedule[0]["next_scheduled_for"].minute == 0


def test_two_files_at_once_are_applied_one_after_the_other(apply, database, other, rows):
    apply(FILE)
    texts = [FILE.replace("every 10m", f"every {minutes}m") for minutes in (11, 12, 13, 14)]

    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(
                lambda pair: apply_file(pair[0], parse_file(pair[1]), actor="tester"),
                zip([database, other, database, other], texts, strict=True),
            )
        )

    assert all(len(changes) == 1 for changes in done)
    assert sorted(row["revision"] for row in rows.definition_revisions) == [1, 2, 3, 4, 5]
    assert [row["revision"] for row in rows.definitions] == [5]


def test_of_many_requests_at_once_one_makes_the_run(apply, database, other, rows):
    apply(FILE)

    def request(number):
        try:
            return run_now((database, other)[number % 2], "org_acme", "digest", actor="tester")["id"]
        except Conflict:
            return None

    with ThreadPoolExecutor(4) as pool:
        made = [run_id for run_id in pool.map(request, range(8)) if run_id]

    assert made == [rows.live_runs[0]["id"]]
    assert len(rows.runs) == 1


def test_one_request_key_sent_at_once_makes_one_run(apply, database, other, rows):
    apply(FILE)

    with ThreadPoolExecutor(4) as pool:
        made = set(
            pool.map(
                lambda place: run_now(place, "org_acme", "digest", actor="tester", request_key="k")["id"],
                [database, other] * 4,
            )
        )

    assert made == {rows.runs[0]["id"]}


def test_a_firing_after_a_suspension_finds_nothing_due(apply, database, rows):
    apply(FILE)
    rows.make_due_since(rows.schedule[0]["next_scheduled_for"] - 6 * TICK)
    set_org_state(database, "org_acme", "suspended", actor="ops")

    with database.transaction() as connection:
        report = firing.fire(
            connection, lambda due, now: decide(due, now, lambda _: Declared()), limit=10, specs={}
        )

    assert (report.inserted, report.next_fire_at) == ([], None)
    assert [(run["state"], run["reason"]) for run in rows.runs] == [("cancelled", "suspended")]
