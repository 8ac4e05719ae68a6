"""Audit rows are written and read, and nothing else; a control shows what the triggers keep away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from worker.clock import SystemClock
from worker.store import audit, tables
from worker.store.database import Database

REPLACE = """
INSERT OR REPLACE INTO audit (id, at, actor, action, subject)
SELECT id, at, 'nobody', action, subject FROM audit
"""
CHANGES = {
    "sqlite": ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit", REPLACE),
    "postgresql": ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit", "TRUNCATE audit"),
}


@pytest.fixture
def recorded(migrated_url: str) -> str:
    """The URL of a database with an audit row."""
    database = Database.open(migrated_url, clock=SystemClock())
    with database.transaction() as connection:
        now = database.now(connection)
        audit.record(connection, [audit.Entry(None, "keys.generate", "k1")], at=now, actor="somebody")
    database.close()
    return migrated_url


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A connection of the tables' owner, without anything of the store's around it."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_an_audit_row_is_never_changed_or_deleted(recorded: str):
    with connected(recorded) as connection:
        before = connection.execute(tables.audit.select()).all()
        for change in CHANGES[connection.dialect.name]:
            with pytest.raises(DBAPIError, match="never"):
                connection.execute(text(change))
            connection.rollback()

        assert connection.execute(tables.audit.select()).all() == before


def test_without_the_triggers_each_of_these_changes_it(recorded: str):
    with connected(recorded) as connection:
        before = connection.execute(tables.audit.select()).all()
        for change in CHANGES[connection.dialect.name]:
            if connection.dialect.name == "sqlite":
                for trigger in ("audit_no_update", "audit_no_delete", "audit_no_replace"):
                    connection.execute(text(f"DROP TRIGGER IF EXISTS {trigger}"))
            else:
                connection.execute(text("ALTER TABLE audit DISABLE TRIGGER audit_append_only"))
            connection.execute(text(change))

            assert connection.execute(tables.audit.select()).all() != before, change
            connection.rollback()
