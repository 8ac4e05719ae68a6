"""Runs retried by what they have in common: which they are, in which order, and each only once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from sqlalchemy import insert, literal, select, true

from tests.conftest import on_either
from tests.fakes.site import one_definition
from worker.errors import NotFound, UsageError
from worker.ids import short_id
from worker.model.search import parsed
from worker.operations import bulk
from worker.operations.bulk import change_many, matching
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.store import tables
from worker.store.edit_runs import Retryable

FILE = one_definition("org_{org}", "{name}", overlap="{overlap}")


SECOND = timedelta(seconds=1)


def utc(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.fixture
def ended(apply, database, rows, clock):
    """Makes a run that has ended, with an attempt where there is a cause; each a second after the last."""
    steps = count(1)

    def make(
        org="acme", name="digest", *, state="failed", reason="error", overlap="allow", cause=None, at=None
    ):
        apply(FILE.format(org=org, name=name, overlap=overlap))
        run = run_now(database, f"org_{org}", name, actor="tester")["id"]
        # The clock moved by hand is in the future of the one database's, whose history this is.
        rows.set_ended(run, state, reason, at or utc("2025-01-01T00:00:00") + next(steps) * SECOND)
        if cause is not None:
            rows.add_attempt(run, at=clock.now(), error_cause=cause)
        return run

    return make


def found(database, *, org=None, limit=100, **which):
    return [row["id"] for row in matching(database, Retryable(**which), org=org, limit=limit)]


def made(database, *, org=None, limit=100, from_checkpoint=False, **which):
    filter_ = Retryable(**which)
    runs = matching(database, filter_, org=org, limit=limit)
    return list(change_many(database, filter_, runs, actor="tester", from_checkpoint=from_checkpoint))


@on_either
def test_a_word_of_an_error_narrows_what_is_retried(ended, database):
    runs = [ended(org) for org in ("acme", "beta", "acme")]
    with database.transaction() as connection:
        connection.execute(
            insert(tables.run_words).from_select(
                ["word", "run_id", "org_id", "shown"],
                select(literal("503"), tables.runs.c.id, tables.runs.c.org_id, true()).where(
                    tables.runs.c.id.in_(runs[1:])
                ),
            )
        )

    def of(text):
        return found(database, query=parsed(text, now=utc("2025-01-01T00:00:00")))

    assert (of("503"), of("acme 503"), of("org:org_acme 50")) == (runs[1:], runs[2:], runs[2:])
    assert (of("acme"), of("504")) == ([runs[0], runs[2]], [])
    assert of(runs[0]) == of(short_id(runs[0], 8)) == of(f"acme {runs[0]}") == [runs[0]]


@on_either
def test_each_filter_narrows_what_is_retried(ended, database):
    early = ended(cause="ValueError: <n>", at=utc("2024-01-01T00:00:00"))
    since = utc("2025-01-01T00:00:00")
    late = ended(cause="OSError: <text>")
    other = ended("other", "export", reason="timed_out")
    refused = ended(state="refused", reason="scope_missing")
    ended(state="succeeded", reason=None)

    assert found(database) == [early, late, other]
    assert found(database, state="refused") == [refused]
    assert found(database, org="org_other") == [other]
    assert found(database, definition="digest") == [early, late]
    assert found(database, since=since) == [late, other]
    assert found(database, reason="timed_out") == [other]
    assert found(database, cause="OSError: <text>") == [late]
    assert found(database, limit=2) == [early, late]
    with pytest.raises(NotFound):
        found(database, org="org_nobody")
    with pytest.raises(UsageError, match="'running'"):
        Retryable(state="running")


@on_either
def test_pages_go_on_by_key_also_where_ends_share_an_instant(ended, database, monkeypatch):
    monkeypatch.setattr(bulk, "PAGE", 2)
    runs = [ended(at=utc("2025-01-01T00:00:00")) for _ in range(5)]

    assert found(database) == sorted(runs)


def test_a_run_is_retried_once_however_often_the_command_is_given(ended, database, rows):
    old = ended()

    [new] = made(database)

    assert (new["id"], new["left"]) == (old, None)
    assert made(database) == []
    # What it became has a place of its own in the line.
    rows.set_ended(new["retried_as"])
    assert [row["id"] for row in made(database)] == [new["retried_as"]]
    kept = {row["id"]: row["idempotency_key"] for row in rows.runs}
    assert set(kept.values()) == {old}


@on_either
def test_two_commands_at_once_make_one_run(ended, database):
    ended()
    first, second = (
        change_many(database, Retryable(), matching(database, Retryable(), org=None, limit=10), actor=actor)
        for actor in "ab"
    )
    old = next(matching(database, Retryable(), org=None, limit=1))["id"]

    def racing():
        # The second has read the page before the first has made its run.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bulk.edit_runs, "page", lambda *_, **__: [page[0]])
            return next(second)

    page = list(matching(database, Retryable(), org=None, limit=1))
    assert next(first)["retried_as"] is not None
    late = racing()

    assert late["retried_as"] is None
    assert f"run {old} was retried already" in late["left"]


def test_what_cannot_be_retried_is_left_with_the_reason_and_the_rest_goes_on(ended, database):
    ended(overlap="skip")
    second = ended(overlap="skip")
    ended("closed")
    set_org_state(database, "org_closed", "paused", actor="tester")
    last = ended("other")

    first, left, paused, other = made(database)

    assert first["retried_as"] is not None
    assert (left["id"], left["retried_as"]) == (second, None)
    assert f"run {first['retried_as']} of this definition is waiting" in left["left"]
    assert "org_closed is paused" in paused["left"]
    assert other["id"] == last and other["retried_as"] is not None


def test_without_a_checkpoint_there_is_none_to_begin_from(ended, database):
    ended()

    assert "saved no checkpoint" in made(database, from_checkpoint=True)[0]["left"]
    assert made(database)[0]["retried_as"] is not None
