"""Why an instant has no run: each cause in words, from what is stored."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.fakes.closing import close_definition
from tests.integration.operations.conftest import whole_hour
from worker.clock import to_text
from worker.errors import Conflict, NotFound
from worker.ids import new_id
from worker.operations.definitions import pause_definition, resume_definition
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.operations.why import why, why_time
from worker.runs.fire import decide
from worker.runs.run import Declared
from worker.store import firing, history, orgs, tables

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
            return why_time(connection, "org_acme", "digest", at, now=database.now(connection))

    return ask_why


def fire(database):
    with database.transaction() as connection:
        firing.fire(connection, lambda due, now: decide(due, now, lambda _: Declared()), limit=100, specs={})


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
    assert re.match(r"it is one of [123] scheduled times in a skip from \S+ until \S+$", found.kept)
    assert found.next.startswith(f"definitions backfill org_acme digest --from {to_text(hour - 2 * HOUR)}")
    assert found.facts["reason"] == "missed"


def test_an_overlap_names_the_run_that_was_on(ask, database, rows, clock):
    on = run_now(database, "org_acme", "digest", actor="kim")
    hour = whole_hour(rows.now()) + HOUR
    clock.set(hour)
    rows.make_due_since(hour)
    fire(database)

    found = ask(hour)

    assert found.facts["reason"] == "overlap"
    assert found.cause == f"run {on['id']} had not ended, and overlap = skip kept it out"


def test_what_is_no_instant_names_those_around_it(ask, rows):
    hour = whole_hour(rows.now())

    found = ask(hour + timedelta(minutes=7))

    assert "is not a scheduled time of org_acme/digest" in found.what
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
    pause_definition(database, "org_acme", "digest", actor="kim", note="broken")
    clock.advance(5 * HOUR)
    resume_definition(database, "org_acme", "digest", actor="kim")

    found = ask(whole_hour(rows.now()) - 2 * HOUR)

    assert found.cause.startswith("the definition was paused by kim at ")
    assert found.cause.endswith("(broken)")


def test_an_orgs_pause_is_the_cause(ask, database, rows, clock):
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

    assert found.cause.startswith("the definition was created at ")


def test_a_run_by_hand_of_that_very_instant_is_found(ask, database, rows, clock):
    clock.set(whole_hour(clock.now()) + HOUR)
    run = run_now(database, "org_acme", "digest", actor="kim")

    assert ask(clock.now()).facts["run"] == run["id"]


THREE = """
[[org]]
code = "{org}"
issuer = "main"

[[definition]]
org = "{org}"
name = "digest"
handler = "acme.plain"
schedule = "@yearly"
"""


@pytest.fixture
def failed(apply, database, rows):
    """A failed run of each of three orgs, by org; `end` ends an attempt of one as it is told."""
    for org in ("org_a", "org_b", "org_c"):
        apply(THREE.format(org=org))

    def end(org: str, cause: str | None, *, ago: timedelta = timedelta(0), error: bool = True) -> str:
        run = run_now(database, org, "digest", actor="kim")
        at = rows.now() - ago
        with database.transaction() as connection:
            connection.execute(
                tables.attempts.insert().values(
                    run_id=run["id"],
                    attempt=1,
                    org_id=orgs.require(connection, org)["id"],
                    worker_id=new_id(),
                    fencing_token=1,
                    handler="acme.plain",
                    started_at=at,
                    handler_started_at=at,
                    ended_at=at,
                    outcome="failed",
                    error={"type": "KeyError", "message": "'title'"} if error else None,
                    error_cause=cause,
                )
            )
        rows.set_ended(run["id"])
        return run["id"]

    return end


def why_of(database, run: str):
    with database.autocommit() as connection:
        return why(connection, run)


def test_it_counts_the_other_orgs_that_met_the_same_error_in_that_hour(database, failed):
    mine = failed("org_a", "KeyError: <text>")
    failed("org_a", "KeyError: <text>")
    assert why_of(database, mine).others == "no other org had the same error in the hour around it"

    failed("org_b", "KeyError: <text>", ago=timedelta(minutes=20))
    failed("org_b", "KeyError: <text>")
    failed("org_c", "ValueError: <n>")
    failed("org_c", "KeyError: <text>", ago=timedelta(hours=2))
    found = why_of(database, mine)
    assert found.facts["other_orgs"] == 1
    assert "1 other org had the same error" in found.sentence


def test_a_waiting_run_without_a_token_counts_the_orgs_that_wait_too(database, failed, rows):
    waiting = [run_now(database, org, "digest", actor="kim")["id"] for org in ("org_a", "org_b", "org_c")]
    with database.transaction() as connection:
        connection.execute(
            update(tables.live_runs).where(tables.live_runs.c.id.in_(waiting[:2])).values(reason="no_token")
        )

    assert why_of(database, waiting[0]).others == "1 other org is waiting for a token"
    assert why_of(database, waiting[2]).others is None


def test_more_rows_than_are_looked_at_are_at_least_so_many(database, failed, monkeypatch):
    monkeypatch.setattr(history, "MOST", 2)
    mine = failed("org_a", "KeyError: <text>")
    for org in ("org_b", "org_c", "org_b"):
        failed(org, "KeyError: <text>")

    assert why_of(database, mine).others.startswith("at least ")


def test_a_closed_definition_is_the_cause_of_what_did_not_come(ask, database, rows, clock):
    close_definition(database, "org_acme", "digest", actor="kim")
    clock.advance(5 * HOUR)

    found = ask(whole_hour(rows.now()))

    assert found.cause.startswith("the definition was closed by kim at ")
    assert ask(whole_hour(rows.now()) + HOUR).cause == "and will not be due: the definition is closed"


def test_a_definition_that_says_enabled_false_is_the_cause(apply, database, rows, ask):
    apply(FILE.replace('spread = "off"', 'spread = "off"\nenabled = false'))

    assert ask(whole_hour(rows.now())).cause == "the definition has enabled = false"
    assert ask(whole_hour(rows.now()) + HOUR).cause == (
        "and will not be due while the definition has enabled = false"
    )


def test_a_held_run_says_what_it_is_behind(apply, database):
    apply(FILE.replace('spread = "off"', 'spread = "off"\noverlap = "queue_one"'))
    on = run_now(database, "org_acme", "digest", actor="kim")
    held = run_now(database, "org_acme", "digest", actor="kim")

    found = why_of(database, held["id"])

    assert held["reason"] == "held"
    assert found.cause.startswith("an earlier run of its definition is unfinished")
    assert found.next == "runs list --org org_acme --definition digest --state running"
    assert why_of(database, on["id"]).facts["reason"] == "due"


@pytest.fixture
def worker_up(database, rows):
    now = rows.now()
    with database.transaction() as connection:
        connection.execute(
            tables.workers.insert().values(
                id=new_id(),
                host="a",
                pid=1,
                version="1",
                started_at=now,
                renewed_at=now,
                lease_until=now + HOUR,
                handlers=[],
                capacity={"children": 1, "inline": 1},
            )
        )


def test_a_run_that_waits_says_what_stands_in_its_way(apply, database, rows):
    apply(FILE.replace('spread = "off"', 'spread = "off"\noverlap = "allow"'))
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]

    alone = why_of(database, run)
    assert (alone.cause, alone.next) == ("no worker is up to run it", "doctor")
    set_org_state(database, "org_acme", "paused", actor="kim")
    paused = why_of(database, run)
    assert paused.cause.startswith("its org was paused by kim at ")
    assert paused.next == "orgs resume org_acme"


def test_a_run_that_waits_behind_its_orgs_limit_says_so(apply, database, rows, worker_up):
    apply(
        FILE.replace('issuer = "main"', 'issuer = "main"\nmax_concurrent_runs = 1').replace(
            'spread = "off"', 'spread = "off"\noverlap = "allow"'
        )
    )
    on = run_now(database, "org_acme", "digest", actor="kim")["id"]
    waiting = run_now(database, "org_acme", "digest", actor="kim")["id"]
    assert why_of(database, waiting).cause == "no worker had a free slot for it yet"

    rows.set_running(on)

    full = why_of(database, waiting)
    assert full.cause == "its org already runs as many as its max_concurrent_runs allows: 1"
    assert full.next == "runs list --org org_acme --state running"
    assert why_of(database, on).facts["state"] == "running"


def test_a_run_that_may_not_start_yet_says_when(apply, database, rows, worker_up):
    apply(FILE)
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]
    later = rows.now() + HOUR
    with database.transaction() as connection:
        connection.execute(update(tables.live_runs).values(available_at=later))

    assert why_of(database, run).cause.endswith(f"; it can start at {to_text(later)}")


def test_what_is_to_be_run_of_an_org_that_was_removed_is_told_how_it_comes_back(apply, database):
    apply(FILE)
    set_org_state(database, "org_acme", "removed", actor="kim")

    with pytest.raises(Conflict) as caught:
        run_now(database, "org_acme", "digest", actor="kim")
    assert caught.value.fix == "`orgs add org_acme` makes it active"
