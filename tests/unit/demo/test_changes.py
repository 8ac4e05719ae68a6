"""The demo's journal: every change of a run's state is told once, in order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from worker.demo.journal import Journal
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


ADMIT = """
UPDATE live_runs SET state = 'running', reason = NULL, worker_id = 'w', started_at = 't',
                     attempt = attempt + 1
"""
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

    told = [(change.attempt, change.state, change.reason, change.detail) for change in journal.read()]

    assert told == [
        (0, "waiting", "due", None),
        (1, "running", None, None),
        (1, "waiting", "no_token", "why"),
        (2, "running", None, None),
        (0, "refused", "org_mismatch", None),
    ]
    assert journal.read() == []


def test_a_change_names_org_and_definition(database, journal):
    database.execute(NEW_RUN)

    [change] = journal.read()

    assert (change.org, change.definition, change.handler) == ("org_acme", "digest", None)


PARK = "UPDATE live_runs SET state = 'parked', reason = 'answer', detail = 'approval', worker_id = NULL"
ASK = """
INSERT INTO waits (run_id, name, occurrence, org_id, kind, ask, opened_at, pending_attempt)
VALUES ('run', 'approval', 1, 'org', 'answer', '{"text": "Refund?"}', 't', 1)
"""
ANSWER = "UPDATE waits SET answer = '\"yes\"', answered_by = 'operator:you', answered_at = 't'"
END = """
UPDATE runs SET state = 'failed', reason = 'error', error = '{"type": "KeyError"}', attempt = 2,
    started_at = '2030-01-01T00:00:00.000000Z', finished_at = '2030-01-01T00:00:01.250000Z'
"""


def test_a_question_comes_with_its_text_and_then_its_answer(database, journal):
    for statement in (RUN, NEW_RUN, ADMIT, ASK, PARK):
        database.execute(statement)
    *_, asked = journal.read()
    database.execute(ANSWER)
    database.execute("UPDATE live_runs SET state = 'waiting', reason = 'resumed', started_at = NULL")

    [resumed] = journal.read()

    assert (asked.state, asked.reason, asked.ask, asked.answer) == (
        *("waiting", "answer"),
        *({"text": "Refund?"}, None),
    )
    assert (resumed.reason, resumed.answer, resumed.answered_by) == ("resumed", "yes", "operator:you")


def test_an_end_comes_with_its_error_and_its_seconds(database, journal):
    database.execute(RUN)
    database.execute(END)

    [ended] = journal.read()

    assert (ended.error, round(ended.took or 0, 3)) == ({"type": "KeyError"}, 1.25)
