"""The store's promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from worker.store.database import Database


@pytest.fixture
def database(migrated_url: str, clock: ManualClock) -> Iterator[Database]:
    """A database of either kind with the schema of this release; its time is `clock`."""
    with clock.moves(migrated_url):
        opened = Database.open(migrated_url, clock=clock)
        yield opened
        opened.close()


@pytest.fixture
def stock(database: Database) -> Stock:
    return Stock(database)


@pytest.fixture
def postgres(migrated_postgres_url: str, clock: ManualClock) -> Iterator[Database]:
    """PostgreSQL, for what only several workers at once can show."""
    opened = Database.open(migrated_postgres_url, clock=clock, threads=4)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_stock(migrated_sqlite_url: str, clock: ManualClock) -> Iterator[Stock]:
    """SQLite, for what it alone promises."""
    opened = Database.open(migrated_sqlite_url, clock=clock)
    yield Stock(opened)
    opened.close()
