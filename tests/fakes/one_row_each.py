"""Inserts a row per org into every table of PostgreSQL, derived from the metadata only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, Table, text
from sqlalchemy.dialects.postgresql import dialect

from worker.ids import new_id
from worker.store import tables
from worker.store.dialect import database_now

_CHECKS = text("""
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE contype IN ('c', 'f') AND connamespace = current_schema::regnamespace
""")


# The tables whose `id` is the id of an `Owner`'s attribute.
_THINGS = {"orgs": "org", "definitions": "definition", "runs": "run", "live_runs": "run"}


@dataclass(frozen=True)
class Owner:
    """An org with one definition and one run; their rows refer to each other."""

    org: str = field(default_factory=new_id)
    definition: str = field(default_factory=new_id)
    run: str = field(default_factory=new_id)


def fill(connection: Connection, owners: Sequence[Owner]) -> None:
    """Drop the CHECK and foreign key constraints, and insert the owners' rows."""
    for table, name in connection.execute(_CHECKS).all():
        connection.execute(text(f'ALTER TABLE {table} DROP CONSTRAINT IF EXISTS "{name}"'))
    at = database_now(connection)
    for owner in owners:
        for table in tables.metadata.sorted_tables:
            connection.execute(table.insert().values(row(table, owner, at)))


def row(table: Table, owner: Owner, at: datetime) -> dict[str, Any]:
    """A row of a table with the owner's ids."""
    return {column.name: _value(table, column, owner, at) for column in table.columns}


def _value(table: Table, column: Column[Any], owner: Owner, at: datetime) -> Any:
    kind = str(column.type.compile(dialect=dialect()))
    thing = _THINGS.get(table.name, "") if column.name == "id" else column.name.removesuffix("_id")
    match kind.partition("(")[0].partition(" COLLATE")[0]:
        case "UUID":
            return getattr(owner, thing, None) or new_id()
        case "TIMESTAMP WITH TIME ZONE":
            return at
        case "DATE":
            return at.date()
        case "JSONB" | "JSON":
            return {}
        case "BOOLEAN":
            return False
        case "BYTEA":
            return b""
        case "TEXT" | "VARCHAR":
            return f"of {owner.org}"
        case "INTEGER" | "BIGINT" | "SMALLINT" | "FLOAT" | "DOUBLE PRECISION":
            return 1
    raise LookupError(f"{table.name}.{column.name} is {kind}: add a value for this type here")
