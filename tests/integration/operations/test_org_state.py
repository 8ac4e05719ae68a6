"""Pauses and the states of an org: settled before, counted from now after, nothing replayed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import select

from tests.conftest import on_either
from tests.fakes.site import definition, one_definition, org_entry
from tests.fakes.stock import await_lock
from worker.errors import Conflict
from worker.model.orgs import OrgEntry
from worker.operations.credentials import add_credential
from worker.operations.definitions import pause_definition, resume_definition
from worker.operations.orgs import add_org, set_org_state
from worker.operations.runs import run_now
from worker.store import tables
from worker.store.sql import statements
from worker.store.sql.contract import Rollups

TICK = timedelta(minutes=10)

FILE = one_definition(schedule="every 10m", spread="off", overlap="allow")


@pytest.fixture
def acme(apply, rows):
    """One org with a definition that nobody fired for the last four instants."""
    apply(FILE)
    rows.make_due_since(rows.schedule[0]["next_scheduled_for"] - 4 * TICK)


def next_of(rows):
    return {(row["next_scheduled_for"], row["next_fire_at"]) for row in rows.schedule}


def due(rows):
    """Instants accounted for: runs of the schedule and skips."""
    return sum(run["origin"] == "schedule" for run in rows.runs) + sum(skip["count"] for skip in rows.skips)


@on_either
def test_pausing_a_definition_settles_what_was_due_and_stops_the_rest(acme, database, rows):
    row = pause_definition(database, "org_acme", "digest", actor="ops", note="migration")

    assert (row["state"], row["paused_by"], row["pause_note"]) == ("paused", "ops", "migration")
    assert due(rows) == 4
    assert next_of(rows) == {(None, None)}
    assert rows.audit[-1]["detail"] == {"note": "migration"}


def test_resuming_a_definition_counts_from_now_and_replays_nothing(acme, database, rows):
    pause_definition(database, "org_acme", "digest", actor="ops")

    row = resume_definition(database, "org_acme", "digest", actor="ops")

    assert (row["state"], row["paused_at"], row["pause_note"]) == ("active", None, None)
    assert rows.now() < row["next_fire_at"] <= rows.now() + TICK
    assert due(rows) == 4
    with pytest.raises(Conflict, match="is not paused"):
        resume_definition(database, "org_acme", "digest", actor="ops")


def test_pausing_an_org_leaves_its_runs_alone(acme, database, rows):
    run_now(database, "org_acme", "digest", actor="ops")

    org = set_org_state(database, "org_acme", "paused", actor="ops", note="unpaid")

    assert (org["state"], org["state_by"], org["state_note"]) == ("paused", "ops", "unpaid")
    assert due(rows) == 4
    assert next_of(rows) == {(None, None)}
    assert all(live["state"] == "waiting" for live in rows.live_runs)
    assert set_org_state(database, "org_acme", "active", actor="ops")["state"] == "active"
    assert next_of(rows) != {(None, None)}
    assert due(rows) == 4


def test_suspending_an_org_cancels_what_waits_and_asks_what_runs(acme, database, rows):
    running = run_now(database, "org_acme", "digest", actor="ops")
    rows.set_running(running["id"])
    waiting = run_now(database, "org_acme", "digest", actor="ops")

    set_org_state(database, "org_acme", "suspended", actor="ops")

    ended = {run["id"]: run for run in rows.runs if run["state"]}
    assert {(run["state"], run["reason"]) for run in ended.values()} == {("cancelled", "suspended")}
    assert waiting["id"] in ended
    [live] = rows.live_runs
    assert (live["id"], live["cancel_reason"]) == (running["id"], "suspended")
    detail = rows.audit[-1]["detail"]
    assert (detail["from"], detail["asked_to_stop"]) == ("active", 1)
    assert detail["cancelled"] == len(ended)


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("change", ["suspend", "close"])
def test_what_is_due_replaces_a_run_before_others_are_cancelled_that_end_now(apply, database, rows, change):
    """Ends lock their runs, then the sums of their orgs."""
    newest = definition("org_acme", "newest", "acme.plain", "every 10m", spread="off", overlap="replace")
    apply(FILE + newest)
    rows.make_due_since(rows.schedule[0]["next_scheduled_for"] - 4 * TICK)
    run_now(database, "org_acme", "newest", actor="ops")
    other = run_now(database, "org_acme", "digest", actor="ops")
    [org] = rows.orgs
    if change == "suspend":
        rows.set_running(other["id"])
    lock = select(tables.live_runs.c.id).where(tables.live_runs.c.id == other["id"]).with_for_update()

    with ThreadPoolExecutor(1) as pool:
        with database.transaction() as batch:
            batch.execute(lock).one()
            if change == "suspend":
                changed = pool.submit(set_org_state, database, "org_acme", "suspended", actor="ops")
            else:
                changed = pool.submit(apply, org_entry("org_acme") + newest.replace("10m", "20m"), prune=True)
            await_lock(database)
            sums = Rollups([(database.now(batch).date(), org["id"], 1, 1, 0)], [])
            statements(batch).add_rollups(batch, sums)
        changed.result()

    reasons = {run["reason"] for run in rows.runs if run["state"] == "cancelled"}
    assert reasons == ({"replaced", "suspended"} if change == "suspend" else {"replaced", "closed"})


def test_setting_a_state_again_changes_nothing(acme, database, rows):
    set_org_state(database, "org_acme", "paused", actor="ops")
    before, audited = rows.everything(), len(rows.audit)

    set_org_state(database, "org_acme", "paused", actor="somebody")

    assert rows.everything() == before
    assert len(rows.audit) == audited


def test_a_removed_org_loses_its_secrets_and_comes_back_without_them(acme, database, keyring, rows, apply):
    add_credential(database, keyring, "org_acme", client_id="c1", secret="s3cret-s3cret", actor="ops")

    set_org_state(database, "org_acme", "removed", actor="ops")

    [credential] = rows.credentials
    assert (credential["sealed"], credential["state"]) == (None, "retired")
    assert next_of(rows) == {(None, None)}
    assert all(row["closed_at"] for row in rows.definitions)
    for state in ("active", "paused", "suspended"):
        with pytest.raises(Conflict, match="was removed"):
            set_org_state(database, "org_acme", state, actor="ops")
    with pytest.raises(Conflict, match="was removed"):
        add_credential(database, keyring, "org_acme", client_id="c1", secret="s3cret-s3cret", actor="ops")

    back = add_org(database, OrgEntry("org_acme", "Acme again", "main"), actor="ops")

    assert (back["state"], back["name"]) == ("active", "Acme again")
    assert next_of(rows) == {(None, None)}
    assert [each.action for each in apply(FILE)] == ["change", "reopen"]
    assert next_of(rows) != {(None, None)}
