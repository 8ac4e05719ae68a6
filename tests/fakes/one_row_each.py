"""A row for each of some orgs in every table of PostgreSQL, made of nothing but the metadata."""

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

# What a column may hold is none of this module's business.
_CHECKS = text("""
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE contype IN ('c', 'f') AND connamespace = current_schema::regnamespace
""")


# In which table `id` is the id of which thing.
_THINGS = {"orgs": "org", "definitions": "definition", "runs": "run", "live_runs": "run"}


@dataclass(frozen=True)
class Owner:
    """An org with one thing of each kind, so that rows that belong together are found together."""

    org: str = field(default_factory=new_id)
    definition: str = field(default_factory=new_id)
    run: str = field(default_factory=new_id)


def fill(connection: Connection, owners: Sequence[Owner]) -> None:
    """Insert their rows, with the CHECK and foreign key constraints out of the way for good."""
    for table, name in connection.execute(_CHECKS).all():
        connection.execute(text(f'ALTER TABLE {table} DROP CONSTRAINT IF EXISTS "{name}"'))
    at = database_now(connection)
    for owner in owners:
        for table in tables.metadata.sorted_tables:
            connection.execute(table.insert().values(row(table, owner, at)))


def row(table: Table, owner: Owner, at: datetime) -> dict[str, Any]:
    """A row of a table that is the owner's in each column that says whose it is."""
    return {column.name: _value(table, column, owner, at) for column in table.columns}


def _value(table: Table, column: Column[Any], owner: Owner, at: datetime) -> Any:
    kind = str(column.type.compile(dialect=dialect()))
    thing = _THINGS.get(table.name, "") if column.name == "id" else column.name.removesuffix("_id")
    match kind.partition("(")[0]:
        case "UUID":
            return getattr(owner, thing, None) or new_id()
        case "TIMESTAMP WITH TIME ZONE":
            return at
        case "DATE":
            return at.date()
        case "JSONB":
            return {}
        case "BOOLEAN":
            return False
        case "BYTEA":
            return b""
        case "TEXT" | "VARCHAR":
            return f"of {owner.org}"
        case "INTEGER" | "BIGINT" | "SMALLINT" | "FLOAT" | "DOUBLE PRECISION":
            return 1
    raise LookupError(f"{table.name}.{column.name} is {kind}: say here what such a column may hold")
