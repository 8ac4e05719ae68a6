"""The demo's journal: every change of a run's state is told once, in order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from worker.demo.run import Journal
from worker.store.tables import metadata

NEW_RUN = """
INSERT INTO live_runs (id, org_id, definition_id, revision, handler, isolation, origin, scheduled_for,
                       idempotency_key, serial, state, reason, available_at)
VALUES ('run', 'org', 'definition', 1, 'h', 'child', 'schedule', 't', 'run', 1, 'waiting', 'due', 't')
"""
RUN = """
INSERT INTO runs (id, org_id, definition_id, revision, handler, origin, scheduled_for, created_at,
                  idempotency_key)
VALUES ('run', 'org', 'definition', 1, 'h', 'schedule', 't', 't', 'run')
"""
ORG = """
INSERT INTO orgs (id, code, name, issuer, state, max_concurrent_runs, weight, tags, created_at, updated_at)
VALUES ('org', 'org_acme', 'Acme', 'main', 'active', 1, 1, '[]', 't', 't')
"""
DEFINITION = """
INSERT INTO definitions (id, org_id, name, revision, enabled, created_at, updated_at)
VALUES ('definition', 'org', 'digest', 1, 1, 't', 't')
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "demo.db"
    engine = create_engine(f"sqlite:///{path}")
    metadata.create_all(engine)
    engine.dispose()
    return str(path)


@pytest.fixture
def database(path: str) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(ORG)
    connection.execute(DEFINITION)
    yield connection
    connection.close()


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    journal = Journal(Path(path))
    yield journal
    journal.close()


ADMIT = "UPDATE live_runs SET state = 'running', reason = NULL, worker_id = 'w', started_at = 't'"
WAIT = """
UPDATE live_runs SET state = 'waiting', reason = 'no_token', detail = 'why',
                     worker_id = NULL, started_at = NULL
"""


def test_a_runs_whole_way_is_told_in_order(database, journal):
    database.execute(RUN)
    database.execute(NEW_RUN)
    database.execute(ADMIT)
    database.execute("UPDATE live_runs SET progress = '{}'")
    database.execute(WAIT)
    database.execute(ADMIT)
    database.execute("DELETE FROM live_runs")
    database.execute("UPDATE runs SET state = 'refused', reason = 'org_mismatch', finished_at = 't'")

    told = [(change.state, change.reason, change.detail) for change in journal.read()]

    assert told == [
        ("waiting", "due", None),
        ("running", None, None),
        ("waiting", "no_token", "why"),
        ("running", None, None),
        ("refused", "org_mismatch", None),
    ]
    assert journal.read() == []


def test_a_change_names_org_and_definition(database, journal):
    database.execute(NEW_RUN)

    [change] = journal.read()

    assert (change.org, change.definition, change.handler) == ("org_acme", "digest", None)
