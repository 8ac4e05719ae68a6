"""What ended before version 0003 is found as what ends after it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from alembic import command
from sqlalchemy import insert, select

from tests.migrations.test_schema import alembic, connected
from worker.ids import new_id
from worker.store import schema, tables

AT = datetime(2030, 1, 1, tzinfo=UTC)


def test_what_ended_before_is_found_and_what_has_not_is_none_of_it(database_url: str) -> None:
    alembic(database_url, command.upgrade, "0002")
    with connected(database_url) as connection:
        for state, age in (("succeeded", 90), ("failed", 0), (None, 0)):
            values = {name: new_id() for name in ("id", "org_id", "definition_id", "idempotency_key")}
            values |= {"handler": "acme.note", "origin": "manual", "revision": 1}
            finished_at = None if state is None else AT - timedelta(days=age)
            connection.execute(
                insert(tables.runs).values(
                    **values, scheduled_for=AT, created_at=AT, state=state, finished_at=finished_at
                )
            )
        named = (tables.runs.c[name] for name in ("id", "org_id", "definition_id", "state", "finished_at"))
        runs = connection.execute(select(*named)).mappings().all()

    schema.upgrade(database_url)

    with connected(database_url) as connection:
        ends = connection.execute(select(tables.run_ends)).mappings().all()
    assert {tuple(row.values()) for row in ends} == {
        (row["state"], row["finished_at"], row["id"], row["org_id"], row["definition_id"])
        for row in runs
        if row["state"]
    }
    assert len(ends) == 2
