"""Runs cancelled by what they have in common: which they are, in which order, and what is told of each."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.conftest import on_either
from tests.fakes.site import one_definition
from worker.errors import NotFound, UsageError
from worker.operations import bulk
from worker.operations.bulk import change_many, matching
from worker.operations.runs import run_now
from worker.store.edit_runs import Cancellable

FILE = one_definition("org_{org}", "{name}", overlap="allow")


@pytest.fixture
def run(apply, database):
    """Makes a run that waits."""

    def make(org="acme", name="digest"):
        apply(FILE.format(org=org, name=name))
        return run_now(database, f"org_{org}", name, actor="tester")["id"]

    return make


def found(database, *, org=None, limit=100, **which):
    return [row["id"] for row in matching(database, Cancellable(**which), org=org, limit=limit)]


def done(database, *, org=None, limit=100, **which):
    filter_ = Cancellable(**which)
    runs = matching(database, filter_, org=org, limit=limit)
    return list(change_many(database, filter_, runs, actor="tester"))


@on_either
def test_each_filter_narrows_what_is_cancelled(run, database, rows):
    first, other, on, ended = run(), run("other", "export"), run(), run()
    rows.set_running(on)
    rows.set_ended(ended)

    assert found(database) == [first, other, on]
    assert found(database, state="running") == [on]
    assert found(database, state="waiting") == [first, other]
    assert found(database, org="org_other") == [other]
    assert found(database, definition="digest") == [first, on]
    assert found(database, reason="due") == [first, other]
    assert found(database, since=rows.now() - timedelta(minutes=1)) == [first, other, on]
    assert found(database, since=rows.now() + timedelta(minutes=1)) == []
    assert found(database, limit=2) == [first, other]
    with pytest.raises(NotFound):
        found(database, org="org_nobody")
    with pytest.raises(UsageError, match="'failed'"):
        Cancellable(state="failed")


def test_each_is_cancelled_or_asked_to_stop_with_an_audit_row_of_its_own(run, database, rows):
    waits, on = run(), run()
    rows.set_running(on)

    assert [(row["id"], row["state"], row["left"]) for row in done(database)] == [
        (waits, "cancelled", None),
        (on, "running", None),
    ]
    entries = [row for row in rows.audit if row["action"] == "run.cancel"]
    assert {(row["subject"], row["actor"]) for row in entries} == {(waits, "tester"), (on, "tester")}
    assert [row["cancel_reason"] for row in rows.live_runs] == ["requested"]
    # Given again, it asks nobody twice.
    assert done(database) == []


@on_either
def test_pages_go_on_by_key_and_stop_at_what_is_made_meanwhile(run, database, monkeypatch):
    monkeypatch.setattr(bulk, "PAGE", 2)
    runs = [run() for _ in range(5)]
    taken = matching(database, Cancellable(), org=None, limit=100)

    seen = [next(taken)["id"]]
    run()

    assert seen + [row["id"] for row in taken] == runs


@on_either
def test_what_ended_or_started_meanwhile_is_let_be(run, database, rows):
    ends, starts, waits = run(), run(), run()
    which = Cancellable(state="waiting")
    cancelling = change_many(database, which, matching(database, which, org=None, limit=10), actor="tester")
    listed = list(matching(database, Cancellable(), org=None, limit=10))
    with pytest.MonkeyPatch.context() as patch:
        # The page was read before the one ended and the other started.
        patch.setattr(bulk.edit_runs, "page", lambda *_, **__: listed)
        rows.set_ended(ends)
        rows.set_running(starts)
        rows_done = list(cancelling)

    assert [(row["id"], row["state"]) for row in rows_done] == [
        (ends, "waiting"),
        (starts, "waiting"),
        (waits, "cancelled"),
    ]
    assert rows_done[2]["left"] is None
    assert "has ended: failed" in rows_done[0]["left"]
    assert "is now running" in rows_done[1]["left"]
