"""The database tables, from their metadata: columns with their PostgreSQL types and meanings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Column
from sqlalchemy.dialects import postgresql

from docs.generate.tables import code, table
from worker.store import tables

# Columns with the same meaning in every table; the page explains them once.
COMMON = {
    "id",
    "org_id",
    "definition_id",
    "run_id",
    "revision",
    "created_at",
    "created_by",
    "updated_at",
    "updated_by",
}
_SHORT = {"TIMESTAMP WITH TIME ZONE": "timestamptz"}


def database() -> str:
    """Return a section for each table, with its meaning and its columns."""
    text = ""
    for _, one in sorted(tables.metadata.tables.items()):
        rows = [(code(column.name), _type(column), column.doc or "") for column in one.columns]
        text += (
            f"## {code(one.name)}\n\n{one.info['meaning']}\n\n{table(('column', 'type', 'meaning'), rows)}\n"
        )
    return text.rstrip("\n") + "\n"


def unexplained() -> Iterator[str]:
    """Yield the columns that have no meaning and are not common."""
    for one in tables.metadata.tables.values():
        for column in one.columns:
            if not column.doc and column.name not in COMMON:
                yield f"{one.name}.{column.name}"


def _type(column: Column[Any]) -> str:
    compiled = column.type.compile(dialect=postgresql.dialect())
    required = "" if column.nullable else ", not null"
    return f"{_SHORT.get(compiled, compiled.lower())}{required}"
