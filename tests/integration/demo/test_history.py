"""The demo's day of history: written by the worker's own statements, so that its sums and states agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.conftest import copied
from tests.fakes.clock import ManualClock, utc
from worker.demo import history
from worker.demo.installation import definitions_file, make_orgs
from worker.handlers.catalogue import HandlerEntry
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.orgs import import_orgs
from worker.store import catalogue
from worker.store.database import Database
from worker.tokens.sealing import KeyRing


@pytest.fixture(scope="module", params=["2030-01-01T09:07:13", "2030-01-01T23:30:00"])
def past(
    request: pytest.FixtureRequest, migrated_sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """The demo's database after its history, in the morning and late at night."""
    now, demo, folder = utc(request.param), make_orgs(), tmp_path_factory.mktemp("past")
    url = copied(migrated_sqlite_file, folder)
    database = Database.open(url, clock=ManualClock(now))
    names = ("assistant.digest", "assistant.digest_v2", "http.request")
    with database.transaction() as connection:
        entries = [HandlerEntry(name, "orgworker", "1.0", "jobs:x") for name in names]
        catalogue.put(connection, entries, at=now)
    keyring = KeyRing.load_or_generate(folder / "keyring")
    lines = [
        {"code": org.code, "issuer": "main", "client_id": "m2m", "client_secret": "s3cret"} for org in demo
    ]
    import_orgs(database, keyring, [json.dumps(line) for line in lines], actor="tester")
    apply(database, parse_file(definitions_file(demo, "http://127.0.0.1:1", now=now)), actor="tester")
    history.add(url, demo, "http://127.0.0.1:1", until=now)
    yield database
    database.close()


def rows(database: Database, query: str) -> list[Any]:
    with database.autocommit() as connection:
        return list(connection.execute(text(query)).mappings())


def test_every_scheduled_time_ran_or_was_skipped(past: Database):
    since = "strftime('%Y-%m-%dT%H:%M', runs.scheduled_for)"
    ran = rows(past, f"SELECT definition_id, {since} AS at FROM runs WHERE origin = 'schedule'")
    skipped = rows(past, "SELECT definition_id, sum(count) AS n FROM skips GROUP BY 1")
    each = Counter(row["definition_id"] for row in ran) + Counter(
        {row["definition_id"]: row["n"] for row in skipped}
    )

    synced = rows(past, "SELECT id FROM definitions WHERE name = 'crm-sync'")
    assert len({each[row["id"]] for row in synced}) == 1
    assert len(ran) == len({(row["definition_id"], row["at"]) for row in ran})


def test_the_sums_by_hour_are_those_of_the_runs(past: Database):
    counted = {(row["state"], row["n"]) for row in rows(past, _BY_STATE)}

    summed = "SELECT state, sum(runs) AS n FROM rollup_hours GROUP BY 1"
    assert {(row["state"], row["n"]) for row in rows(past, summed)} == counted
    assert {state for state, _ in counted} >= {"succeeded", "failed"}


_BY_STATE = "SELECT state, count(*) AS n FROM runs WHERE state IS NOT NULL GROUP BY 1"


def test_nothing_of_it_is_left_running_or_lies_in_the_future(past: Database):
    with past.autocommit() as connection:
        now = past.now(connection)
    live = rows(past, "SELECT state, reason FROM live_runs")
    latest = rows(past, "SELECT max(finished_at) AS at FROM runs")[0]["at"]

    assert {row["state"] for row in live} <= {"waiting"}
    assert {row["reason"] for row in live} <= {"no_token", "retry"}
    assert latest < (now - history.GAP + timedelta(seconds=1)).isoformat()
