"""Many rows in one statement: the same values as one by one, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select, text

from worker.ids import OrgId, new_id
from worker.store import tables
from worker.store.bulk import among, insert_many
from worker.store.database import Database
from worker.store.dialect import all_rows, driver

AT = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
NAMES = ['with "quotes" and \\ backslashes', "braces {a,b}", "NULL", "", "Ünïcödé 漢字", "line\nbreak, comma"]


def org_rows(names: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": OrgId(new_id()), "code": f"org_{number}", "name": name, "issuer": "main", "weight": 1}
        | {"max_concurrent_runs": 10, "timezone": None, "tags": [name], "created_at": AT, "updated_at": AT}
        for number, name in enumerate(names)
    ]


def read(database: Database, table: Any, *columns: str) -> list[dict[str, Any]]:
    with database.autocommit() as connection:
        query = select(*(table.c[name] for name in columns)).order_by(table.c[columns[0]])
        return [dict(row) for row in connection.execute(query).mappings()]


# More than one statement of SQLite takes, and of PostgreSQL.
@pytest.mark.parametrize("count", [1, 6, 700, 1_001])
def test_values_are_stored_as_they_are(database: Database, count: int):
    rows = org_rows([NAMES[number % len(NAMES)] for number in range(count)])
    with database.transaction() as connection:
        insert_many(connection, tables.orgs, rows)

    assert read(database, tables.orgs, *rows[0]) == sorted(rows, key=lambda row: row["id"])
    assert {row["state"] for row in read(database, tables.orgs, "id", "state")} == {"active"}


def test_nulls_binaries_and_booleans_are_stored_as_they_are(database: Database):
    org = org_rows(["Acme"])[0]
    common = {"org_id": org["id"], "client_id": "m2m", "kind": "client_secret", "created_by": "ops"}
    credentials = [
        {"id": new_id(), "generation": 1, "sealed": b'\x00\x01\\"{}\xff', "reference": None, "key_id": "k1"},
        {"id": new_id(), "generation": 2, "sealed": None, "reference": "file:a", "key_id": None},
    ]
    rows = [row | common | {"created_at": AT} for row in credentials]
    entry = {"id": new_id(), "at": AT, "actor": "ops", "action": "org.add", "org_id": None, "subject": "x"}
    with database.transaction() as connection:
        insert_many(connection, tables.orgs, [org])
        insert_many(connection, tables.credentials, rows)
        insert_many(connection, tables.audit, [entry | {"detail": None}])
        insert_many(connection, tables.audit, [])

    assert read(database, tables.credentials, *rows[0]) == rows
    assert read(database, tables.audit, *entry, "detail") == [entry | {"detail": None}]


def test_a_row_that_is_there_stays_or_is_changed_in_part(database: Database):
    [org] = org_rows(["Acme"])
    first = {"definition_id": new_id(), "org_id": org["id"], "next_scheduled_for": AT, "next_fire_at": AT}
    again = first | {"org_id": new_id(), "next_scheduled_for": None, "next_fire_at": None}
    with database.transaction() as connection:
        insert_many(connection, tables.schedule, [first])
        key = ("definition_id",)
        insert_many(connection, tables.schedule, [again], key=key)
        kept = all_rows(connection, select(tables.schedule))
        insert_many(connection, tables.schedule, [again], key=key, replaced=("next_fire_at",))

    assert kept == [first]
    assert read(database, tables.schedule, *first) == [first | {"next_fire_at": None}]


def test_rows_are_found_by_many_values(database: Database):
    rows = org_rows([NAMES[number % len(NAMES)] for number in range(30)])
    with database.transaction() as connection:
        insert_many(connection, tables.orgs, rows)
        wanted = [row["id"] for row in rows[:12]]
        by_id = all_rows(
            connection, select(tables.orgs.c.id).where(among(connection, tables.orgs.c.id, wanted))
        )
        by_name = select(tables.orgs.c.id).where(among(connection, tables.orgs.c.name, NAMES[:2]))
        nothing = select(tables.orgs.c.id).where(among(connection, tables.orgs.c.id, []))

        assert {row["id"] for row in by_id} == set(wanted)
        assert len(all_rows(connection, by_name)) == 10
        assert all_rows(connection, nothing) == []


def test_postgresql_knows_the_values_when_it_plans(postgres: Database):
    """A cast from text is computed for each row instead, and no index is used."""
    with postgres.transaction() as connection:
        insert_many(connection, tables.orgs, org_rows(["Acme"] * 2_000))
        connection.execute(text("ANALYZE orgs"))
        wanted = [new_id() for _ in range(50)]
        query = select(tables.orgs.c.code).where(among(connection, tables.orgs.c.id, wanted))
        sent = query.compile(dialect=connection.dialect)
        explained = driver(connection).execute(f"EXPLAIN {sent}", sent.params).fetchall()

    plan = "\n".join(line for (line,) in explained)
    assert "Index" in plan and "Seq Scan" not in plan
