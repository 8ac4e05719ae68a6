"""No page reads without a limit, or a large table from end to end: the short form of `bench.console`."""

from __future__ import annotations

import pytest

from bench import console
from bench.history import fill
from worker.clock import SystemClock
from worker.ids import ALL_ORGS
from worker.store.database import Database
from worker.store.lists import live
from worker.store.tables import FINAL_STATES


async def test_every_statement_of_a_page_is_bounded_and_uses_an_index(migrated_url: str):
    fill(migrated_url, runs=3_000, orgs=80)

    pages = await console.measure_all(migrated_url, rounds=1, strict=True)

    assert len(pages) >= 4
    assert {page.path: page.status for page in pages if page.status not in (200, 303)} == {}
    assert {page.path: page.statement_faults() for page in pages if page.statement_faults()} == {}
    assert {page.path: page.requests for page in pages if page.requests > console.MAX_REQUESTS} == {}
    assert {page.path: page.kilobytes for page in pages if page.kilobytes > console.MAX_KB} == {}


def test_the_read_for_the_streams_of_lists_is_bounded_and_uses_indexes(migrated_url: str):
    """Also for a page that has been open since before the first run."""
    fill(migrated_url, runs=3_000, orgs=80)
    database = Database.open(migrated_url, clock=SystemClock())
    recorder = console.Recorder(strict=True)
    with recorder.on() as statements, database.transaction() as connection:
        read = live.changes(connection, ALL_ORGS, 0, ())
    database.close()

    assert [fault for statement in statements for fault in statement.faults] == []
    assert len(statements) < 20
    assert live.NEWEST < len(read.found) <= live.NEWEST * (1 + len(FINAL_STATES)) + 2 * live.NEWEST_WORKERS
    # Older changes are left out.
    assert read.begins > 0


@pytest.mark.parametrize(
    ("sql", "fault"),
    [
        ("SELECT id FROM runs WHERE state = 'failed'", "no LIMIT"),
        ("SELECT id FROM runs WHERE detail = 'x' LIMIT 5", "reads all of runs"),
        ("SELECT id FROM runs ORDER BY id DESC LIMIT 5", None),
    ],
)
def test_the_recorder_finds_what_it_looks_for(migrated_url: str, sql: str, fault: str | None):
    """The control."""
    database = Database.open(migrated_url, clock=SystemClock())
    recorder = console.Recorder(strict=True)
    with recorder.on() as statements, database.transaction() as connection:
        connection.exec_driver_sql(sql)
    database.close()

    faults = [each for statement in statements for each in statement.faults]
    assert any(fault in each for each in faults) if fault else faults == []
