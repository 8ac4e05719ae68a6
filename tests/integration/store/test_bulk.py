"""Many rows in one statement: the same values as one by one, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select

from worker.ids import OrgId, new_id
from worker.store import tables
from worker.store.bulk import insert_many
from worker.store.database import Database
from worker.store.dialect import all_rows

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
