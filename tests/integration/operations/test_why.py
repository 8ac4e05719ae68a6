"""Why an instant has no run: each cause in words, from what is stored."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.integration.operations.conftest import whole_hour
from worker.clock import to_text
from worker.errors import NotFound
from worker.operations.org_state import set_org_state
from worker.operations.pause import pause_definition, resume_definition
from worker.operations.run_now import run_now
from worker.operations.why import why, why_instant
from worker.runs.fire import decide
from worker.store import runs, tables

HOUR = timedelta(hours=1)
FILE = """
[[org]]
code = "org_acme"
issuer = "main"

[[definition]]
org = "org_acme"
name = "digest"
handler = "acme.plain"
schedule = "every 1h"
spread = "off"
misfire_within = "1d"
"""


@pytest.fixture
def ask(apply, database):
    apply(FILE)

    def ask_why(at):
        with database.autocommit() as connection:
            return why_instant(connection, "org_acme", "digest", at, now=database.now(connection))

    return ask_why


def fire(database):
    with database.transaction() as connection:
        runs.fire(connection, lambda due, now: decide(due, now, lambda _: "child"), limit=100, specs={})


def test_an_instant_with_a_run_is_that_runs(ask, database, rows):
    hour = whole_hour(rows.now())
    rows.make_due_since(hour)
    fire(database)
    (run,) = rows.runs

    found = ask(hour)

    assert found.facts["run"] == run["id"]
    with database.autocommit() as connection:
        assert why(connection, run["id"]) == why(connection, run["id"], org="org_acme") == found
        with pytest.raises(NotFound):
            why(connection, run["id"], org="org_beta")


def test_a_missed_instant_names_its_skip_and_the_backfill(ask, database, rows):
    hour = whole_hour(rows.now())
    rows.make_due_since(hour - 3 * HOUR)
    fire(database)

    found = ask(hour - 2 * HOUR)

    assert found.what == f"{to_text(hour - 2 * HOUR)} was skipped for org_acme/digest"
    assert "misfire = once" in found.cause
    # How many depends on where midnight is: a skip ends there.
    assert re.match(r"it is one of [123] instants counted in a skip from \S+ until \S+$", found.kept)
    assert found.next.startswith(f"definitions backfill org_acme digest --from {to_text(hour - 2 * HOUR)}")
    assert found.facts["reason"] == "missed"


def test_an_overlap_names_the_run_that_was_on(ask, database, rows, clock):
    on = run_now(database, "org_acme", "digest", actor="kim")
    hour = whole_hour(rows.now()) + (HOUR if database.dialect == "sqlite" else timedelta())
    if database.dialect == "sqlite":
        clock.set(hour)
    else:
        # Its clock cannot be moved: the run was made before the hour began.
        with database.transaction() as connection:
            connection.execute(update(tables.runs).values(created_at=hour - HOUR))
    rows.make_due_since(hour)
    fire(database)

    found = ask(hour)

    assert found.facts["reason"] == "overlap"
    assert found.cause == f"run {on['id']} had not ended, and overlap = skip kept it out"


def test_what_is_no_instant_names_those_around_it(ask, rows):
    hour = whole_hour(rows.now())

    found = ask(hour + timedelta(minutes=7))

    assert "is no instant of org_acme/digest" in found.what
    assert to_text(hour) in found.cause
    assert to_text(hour + HOUR) in found.cause


def test_what_is_still_to_come_says_whether_it_will(ask, database, rows):
    hour = whole_hour(rows.now()) + 5 * HOUR
    assert ask(hour).cause == "it is due then"

    pause_definition(database, "org_acme", "digest", actor="kim", note="broken")
    assert ask(hour).cause == "and will not be due while the definition is paused by kim"
    set_org_state(database, "org_acme", "suspended", actor="kim")
    assert ask(hour).cause == "and will not be due while the org is suspended"


def test_a_pause_that_is_over_is_still_the_cause(ask, database, rows, clock):
    if database.dialect == "postgresql":
        pytest.skip("its clock cannot be moved")
    pause_definition(database, "org_acme", "digest", actor="kim", note="broken")
    clock.advance(5 * HOUR)
    resume_definition(database, "org_acme", "digest", actor="kim")

    found = ask(whole_hour(rows.now()) - 2 * HOUR)

    assert found.cause.startswith("the definition was paused by kim at ")
    assert found.cause.endswith("(broken)")


def test_an_orgs_pause_is_the_cause(ask, database, rows, clock):
    if database.dialect == "postgresql":
        pytest.skip("its clock cannot be moved")
    set_org_state(database, "org_acme", "paused", actor="kim")
    clock.advance(5 * HOUR)

    assert ask(whole_hour(rows.now())).cause.startswith("the org was paused by kim at ")


def test_what_nobody_fired_is_told(ask, rows):
    hour = whole_hour(rows.now())
    rows.make_due_since(hour)
    assert ask(hour).cause == "no worker has fired it yet"

    rows.make_due_since(hour, spread=timedelta(hours=2))
    assert ask(hour).cause.startswith("its spread has not passed yet: it fires at ")


def test_before_the_definition_was_made_nothing_was_due(ask, rows):
    found = ask(whole_hour(rows.now()) - 3 * HOUR)

    assert found.cause.startswith("the definition was made at ")


def test_a_run_by_hand_of_that_very_instant_is_found(ask, database, rows, clock):
    if database.dialect == "postgresql":
        pytest.skip("its clock cannot be moved")
    clock.set(whole_hour(clock.now()) + HOUR)
    run = run_now(database, "org_acme", "digest", actor="kim")

    assert ask(clock.now()).facts["run"] == run["id"]
