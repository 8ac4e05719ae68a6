"""Lists page by key, newest first, show the documented columns, and keep orgs apart."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from tests.fakes.rows import attempt_row, checkpoint_row
from tests.fakes.site import definition as one_more
from tests.fakes.site import one_definition
from tests.integration.operations.conftest import CATALOGUE
from worker.errors import NotFound
from worker.ids import ALL_ORGS, new_id
from worker.operations.definitions import pause_definition
from worker.operations.runs import run_now
from worker.store import catalogue, tables
from worker.store.lists import AUDIT, DEFINITIONS, ORGS, RUNS, SKIPS, TROUBLES, Page
from worker.store.lists import runs as run_lists
from worker.store.lists.read import definition, read
from worker.store.lists.rows import Run, columns_of

FILE = "".join(
    one_definition(code, schedule="0 3 * * *", timezone="Europe/Berlin", overlap="allow")
    + one_more(code, "other", "acme.plain", "every 10m", enabled=False, overlap="allow")
    for code in ("org_a", "org_b")
)


@pytest.fixture
def connection(database, apply):
    apply(FILE)
    with database.autocommit() as opened:
        yield opened


def ids(rows):
    return [row["id"] for row in rows]


@pytest.fixture
def runs(database, connection):
    """Six runs, oldest first: three of org_a, then three of org_b."""
    return [
        run_now(database, code, name, actor="tester")["id"]
        for code in ("org_a", "org_b")
        for name in ("digest", "other", "digest")
    ]


@on_either
def test_runs_are_narrowed_by_org_definition_state_and_time(connection, runs, rows):
    rows.set_running(runs[0])
    rows.set_ended(runs[1], "refused", "org_mismatch")

    assert ids(read(connection, RUNS, "org_a")) == runs[2::-1]
    assert ids(read(connection, RUNS, "org_a", Page(definition="other"))) == [runs[1]]
    assert ids(read(connection, RUNS, ALL_ORGS, Page(definition="other"))) == [runs[4], runs[1]]
    assert ids(read(connection, RUNS, ALL_ORGS, Page(state="running"))) == [runs[0]]
    assert ids(read(connection, RUNS, ALL_ORGS, Page(state="refused"))) == [runs[1]]
    assert ids(read(connection, RUNS, "org_a", Page(state="waiting"))) == [runs[2]]
    now = rows.now()
    assert len(read(connection, RUNS, ALL_ORGS, Page(since=now - timedelta(hours=1)))) == 6
    assert read(connection, RUNS, ALL_ORGS, Page(since=now + timedelta(hours=1))) == []


@on_either
def test_a_running_run_is_shown_with_the_attempt_that_is_on(database, connection, runs, rows):
    run = runs[0]
    rows.set_running(run)
    org_id = next(org["id"] for org in rows.orgs if org["code"] == "org_a")
    with database.transaction() as writing:
        error, claims = {"type": "ValueError", "message": "no"}, {"org_code": "org_a"}
        ended = attempt_row(run, org_id, rows.now(), attempt=0, fencing_token=0, error=error, claims=claims)
        writing.execute(ended)
        writing.execute(checkpoint_row(run, org_id, rows.now(), {"done": 3}))

    shown = run_lists.run(connection, "org_a", run)

    assert shown.keys() >= {*columns_of(Run), "attempts", "checkpoint", "claims", "spec"}
    ended, on = shown["attempts"]
    assert (ended["outcome"], ended["error"]["type"]) == ("failed", "ValueError")
    assert (on["attempt"], on["outcome"], on["ended_at"], on["fencing_token"]) == (1, None, None, 1)
    assert on["worker"] == shown["worker"]
    assert shown["claims"] == {"org_code": "org_a"}
    assert shown["checkpoint"] == {"done": 3}
    assert shown["spec"]["handler"] == "acme.plain"
    with pytest.raises(NotFound):
        run_lists.run(connection, ALL_ORGS, new_id())


@on_either
def test_a_run_is_shown_with_what_it_sent_most_requests_first(database, connection, runs, rows):
    org_id = next(org["id"] for org in rows.orgs if org["code"] == "org_a")
    numbers = {"bytes_out": 10, "bytes_in": 20, "statuses": {"200": 1}, "waited_seconds": 0.5}
    sent = [
        {"origin": origin, "requests": requests, "denied": denied} | numbers
        for origin, requests, denied in (
            ("https://api.example", 3, 0), ("https://evil.example", 0, 4), ("https://a.example", 0, 1)
        )
    ]  # fmt: skip
    with database.transaction() as writing:
        writing.execute(
            tables.run_egress.insert(),
            [row | {"run_id": runs[0], "org_id": org_id, "attempt": 1} for row in reversed(sent)],
        )

    assert run_lists.run(connection, "org_a", runs[0])["egress"] == sent
    assert run_lists.run(connection, "org_a", runs[1])["egress"] == []


@on_either
def test_definitions_show_the_schedule_in_force_and_what_is_next(database, connection):
    pause_definition(database, "org_b", "digest", actor="ops")
    close_definition(database, "org_b", "other", actor="ops")

    listed = read(connection, DEFINITIONS, ALL_ORGS)

    assert {(row["org"], row["name"], row["state"]) for row in listed} == {
        ("org_a", "digest", "active"),
        ("org_a", "other", "disabled"),
        ("org_b", "digest", "paused"),
    }
    first = read(connection, DEFINITIONS, "org_a", Page(state="active"))[0]
    assert (first["timezone"], first["schedule"]) == ("Europe/Berlin", "0 3 * * *")
    assert first["next_scheduled_for"].hour in (1, 2)
    for state in DEFINITIONS.states:
        found = read(connection, DEFINITIONS, ALL_ORGS, Page(state=state))
        assert len(found) == (state not in TROUBLES), state
    assert definition(connection, "org_b", "other")["state"] == "closed"
    assert definition(connection, "org_a", "other")["spec"]["overlap"] == "allow"
    with pytest.raises(NotFound):
        definition(connection, "org_a", "nothing")


@on_either
def test_skips_have_their_columns(database, connection, rows):
    digest = next(row for row in rows.definitions if row["name"] == "digest")
    at = rows.now()
    with database.transaction() as writing:
        writing.execute(
            tables.skips.insert().values(
                id=new_id(),
                org_id=digest["org_id"],
                definition_id=digest["id"],
                revision=1,
                skipped_from=at - timedelta(hours=2),
                skipped_until=at - timedelta(hours=1),
                count=7,
                reason="missed",
            )
        )
    code = next(org["code"] for org in rows.orgs if org["id"] == digest["org_id"])

    [skip] = read(connection, SKIPS, code, Page(definition="digest"))

    assert tuple(skip) == (
        "id",
        "org",
        "definition",
        "revision",
        "skipped_from",
        "skipped_until",
        "count",
        "reason",
    )
    assert (skip["count"], skip["reason"], skip["org"]) == (7, "missed", code)
    assert read(connection, SKIPS, ALL_ORGS, Page(since=at)) == []
    assert len(read(connection, SKIPS, ALL_ORGS, Page(since=at - timedelta(hours=1)))) == 1


@on_either
def test_orgs_and_the_audit_are_listed(connection):
    assert [row["code"] for row in read(connection, ORGS, ALL_ORGS)] == ["org_b", "org_a"]
    assert read(connection, ORGS, ALL_ORGS, Page(state="paused")) == []
    [first, *_] = read(connection, AUDIT, "org_a")
    assert (first["actor"], first["org"]) == ("tester", "org_a")
    assert len(read(connection, AUDIT, ALL_ORGS)) == 6


@on_either
def test_the_catalogue_keeps_the_broken_ones_and_forgets_what_is_gone(database, connection, rows):
    assert [(row["name"], row["error"] is None) for row in catalogue.entries(connection)] == [
        ("acme.also", True),
        ("acme.broken", False),
        ("acme.confuses", True),
        ("acme.exceeds", True),
        ("acme.inline", True),
        ("acme.keeps", True),
        ("acme.lists", True),
        ("acme.note", True),
        ("acme.plain", True),
        ("acme.starts", True),
    ]
    assert ("acme-jobs", "1.0", "acme.plain") in catalogue.offered(connection)
    with database.transaction() as writing:
        catalogue.put(writing, CATALOGUE[:1], at=rows.now())
        catalogue.forget(writing, "acme-jobs", but=["acme.note"])

    assert [row["name"] for row in catalogue.entries(connection)] == [
        "acme.broken",
        "acme.inline",
        "acme.note",
    ]
    [note] = catalogue.entries(connection, "acme.note")
    assert note["scopes"] == ["read:kb"]
    assert note["params_schema"]["required"] == ["text"]
