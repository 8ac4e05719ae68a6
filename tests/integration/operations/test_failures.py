"""Pause after failures: counted one after the other, paused at the number the definition allows."""

from __future__ import annotations

import pytest

from tests.conftest import on_either
from tests.fakes.site import one_definition
from worker.ids import new_id
from worker.operations.definitions import count_failures, resume_definition
from worker.operations.runs import run_now
from worker.store import tables

FILE = one_definition(schedule="@hourly", overlap="allow", pause_after_failures=3)


@pytest.fixture
def run(apply, database, rows, clock):
    """Let runs end like this, and count."""
    apply(FILE)

    def run_and_end(*states: str, origin: str = "manual") -> int:
        for state in states:
            clock.advance(1)
            made = run_now(database, "org_acme", "digest", actor="tester")
            if origin != "manual":
                with database.transaction() as connection:
                    runs = tables.runs
                    connection.execute(
                        runs.update()
                        .where(runs.c.id == made["id"])
                        .values(origin=origin, backfill_id=new_id(), request_key=None)
                    )
            rows.set_ended(made["id"], state, None if state == "succeeded" else "error")
        (definition,) = rows.definitions
        return count_failures(database, definition["org_id"], definition["id"])

    return run_and_end


def definition(rows):
    return rows.definitions[0]


def test_so_many_failures_one_after_the_other_pause_it(run, rows, emitted):
    assert run("failed", "refused") == 2
    assert (definition(rows)["consecutive_failures"], definition(rows)["paused_at"]) == (2, None)

    assert run("failed") == 3

    paused = definition(rows)
    assert (paused["paused_by"], paused["consecutive_failures"]) == ("worker", 3)
    assert paused["pause_note"].startswith("3 failures in a row, the last of them run ")
    assert rows.schedule[0]["next_fire_at"] is None
    (entry,) = [entry for entry in rows.audit if entry["action"] == "definition.pause"]
    assert (entry["actor"], entry["subject"]) == ("worker", "org_acme digest")
    (event,) = [event for event in emitted if event.event.name == "definition.paused"]
    assert event.fields == {"org": "org_acme", "definition": "digest", "failures": 3}


def test_a_success_begins_the_count_anew(run, rows):
    run("failed", "failed")
    assert run("succeeded") == 0
    assert definition(rows)["consecutive_failures"] == 0

    assert run("failed", "failed") == 2
    assert definition(rows)["paused_at"] is None


def test_what_was_cancelled_or_skipped_says_nothing(run, rows):
    assert run("failed", "cancelled", "failed", "skipped") == 2
    assert run("failed") == 3
    assert definition(rows)["paused_at"] is not None


@on_either
@pytest.mark.parametrize("origin", ["backfill", "child"])
def test_a_backfill_of_old_instants_does_not_pause_what_is_due_now(run, rows, origin):
    """And neither do the runs that a run has started: what they mean for it is its own affair."""
    assert run("failed", "failed", "failed", origin=origin) == 0
    assert definition(rows)["paused_at"] is None


@on_either
def test_a_resume_and_an_edit_begin_the_count_anew(run, rows, apply, database, clock):
    run("failed", "failed", "failed")
    clock.advance(1)

    resume_definition(database, "org_acme", "digest", actor="tester")
    assert run("failed", "failed") == 2

    clock.advance(1)
    apply(FILE.replace("@hourly", "@daily"))
    assert run("failed", "failed") == 2
    assert definition(rows)["paused_at"] is None


def test_without_the_key_nothing_is_counted(run, rows, apply):
    apply(FILE.replace("pause_after_failures = 3", ""))

    assert run("failed", "failed", "failed", "failed") == 0
    assert definition(rows)["consecutive_failures"] == 0


def test_counting_leaves_the_definition_as_it_was(run, rows):
    before = definition(rows)["updated_at"]
    run("failed")
    assert definition(rows)["updated_at"] == before
