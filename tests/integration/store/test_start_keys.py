"""Keys of starts are forgotten at their age, on both databases; those whose runs are not made are kept."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import insert, select

from worker.ids import new_id
from worker.store import starts, tables
from worker.store.database import Database

WEEK = timedelta(days=7)


def test_only_keys_of_runs_that_were_made_are_forgotten_the_oldest_first(database: Database) -> None:
    with database.transaction() as connection:
        now = database.now(connection)
        ages = {"old": 9, "older": 10, "young": 6, "due": None}
        for key, days in ages.items():
            row = {
                **{
                    "id": new_id(),
                    "org_id": new_id(),
                    "definition_id": new_id(),
                    "key": key,
                    "login": "shop",
                },
                "created_at": now - timedelta(days=30),
                "state": "due" if days is None else "made",
                "made_at": None if days is None else now - timedelta(days=days),
            }
            connection.execute(insert(tables.starts).values(row))

    def left() -> set[str]:
        with database.autocommit() as connection:
            return set(connection.execute(select(tables.starts.c.key)).scalars())

    with database.transaction() as connection:
        assert starts.forget(connection, WEEK, limit=1) == 1
    assert left() == {"old", "young", "due"}
    with database.transaction() as connection:
        assert starts.forget(connection, WEEK, limit=5) == 1
    assert left() == {"young", "due"}
