"""Rows by the hundred in one statement, which costs a tenth of a statement for each.

On PostgreSQL they are arrays: the driver takes longer to read hundreds of parameters than the query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    Select,
    Table,
    any_,
    bindparam,
    literal,
    update,
)
from sqlalchemy.types import JSON, UserDefinedType

from worker.store.dialect import Id, Instant, chunks, compact_json, driver, is_postgresql
from worker.store.sql.postgresql.arrays import binaries, plain, texts, timestamps
from worker.store.sql.sqlite.values import in_one_step, instant

# Rows of one statement.
ROWS = 1_000


class _Form(NamedTuple):
    """How a type of column is written: its PostgreSQL type and array, and its value on SQLite."""

    postgresql: str
    array: Callable[[Iterable[Any]], str]
    sqlite: Callable[[Any], Any] | None = None


def insert_many(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    key: Sequence[str] = (),
    replaced: Sequence[str] = (),
    counted: str | None = None,
) -> None:
    """Insert rows that all have the columns of the first one; the first of these is never null.

    With `key`, the row that already has this key stays, except for its columns in `replaced`; its column
    `counted` grows by one.
    """
    if not rows:
        return
    names = tuple(rows[0])
    forms = [_form_of(table.c[name]) for name in names]
    kept = _on_conflict(table, tuple(key), tuple(replaced), counted)
    raw = driver(connection)
    if is_postgresql(connection):
        statement = _on_postgresql(table, names) + kept
        for part in chunks(rows, ROWS):
            raw.execute(
                statement,
                [form.array([row[name] for row in part]) for name, form in zip(names, forms, strict=True)],
            )
        return
    columns = [(name, form.sqlite) for name, form in zip(names, forms, strict=True)]
    values = [
        tuple([row[name] if write is None else write(row[name]) for name, write in columns]) for row in rows
    ]
    in_one_step(raw.cursor(), _on_sqlite(table, names) + kept, values)


def update_many(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    key: Sequence[str],
    changed: Sequence[str],
) -> None:
    """Write the `changed` columns of rows that this transaction has locked, each found by its `key`."""
    if not rows:
        return
    found = [table.c[name] == bindparam(f"of_{name}") for name in key]
    statement = update(table).where(*found).values({name: bindparam(f"to_{name}") for name in changed})
    values = [
        {f"of_{name}": row[name] for name in key} | {f"to_{name}": row[name] for name in changed}
        for row in rows
    ]
    connection.execute(statement, values)


class _ArrayText(UserDefinedType[str]):
    """The text of an array as a parameter whose type PostgreSQL infers: with a cast it would have no plan."""

    cache_ok = True


def among(connection: Connection, column: Column[Any], values: Iterable[Any]) -> ColumnElement[bool]:
    """A condition: the column has one of these values, never null."""
    if not is_postgresql(connection):
        return column.in_(list(values))
    return column == any_(literal(_form_of(column).array(values), _ArrayText()))


def rows_among(
    connection: Connection, query: Select[Any], column: Column[Any], values: Iterable[Any]
) -> list[Any]:
    """The rows of a query whose column has one of these values: some hundred values at a time, in order."""
    return [
        row
        for part in chunks(sorted(set(values)))
        for row in connection.execute(query.where(among(connection, column, part)))
    ]


@functools.cache
def _on_postgresql(table: Table, names: tuple[str, ...]) -> str:
    arrays = ", ".join(f"%s::{_form_of(table.c[name]).postgresql}[]" for name in names)
    return f"INSERT INTO {table.name} ({_quoted(names)}) SELECT * FROM unnest({arrays})"


@functools.cache
def _on_sqlite(table: Table, names: tuple[str, ...]) -> str:
    # `WHERE` drops the rows of nulls that pad a batch.
    return f"INSERT INTO {table.name} ({_quoted(names)}) SELECT * FROM {{rows}} WHERE column1 IS NOT NULL"


def _on_conflict(table: Table, key: tuple[str, ...], replaced: tuple[str, ...], counted: str | None) -> str:
    if not key:
        return ""
    if not replaced:
        return f" ON CONFLICT ({_quoted(key)}) DO NOTHING"
    changes = ", ".join(f'"{name}" = excluded."{name}"' for name in replaced)
    if counted is not None:
        changes += f', "{counted}" = {table.name}."{counted}" + 1'
    return f" ON CONFLICT ({_quoted(key)}) DO UPDATE SET {changes}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _jsons(values: Iterable[Any]) -> str:
    """As `jsons`; the text of a value that follows itself, as the spec of a template, is made once."""
    found: list[str | None] = []
    last, text = None, None
    for value in values:
        if value is not last:
            last, text = value, _json_text(value)
        found.append(text)
    return texts(found)


def _json_text(value: Any) -> str | None:
    return None if value is None else compact_json(value)


# A type of column is written as the first of these that it is, else as text.
_FORMS: Sequence[tuple[type, _Form]] = (
    (Id, _Form("uuid", plain)),
    (Instant, _Form("timestamptz", timestamps, instant)),
    (JSON, _Form("jsonb", _jsons, _json_text)),
    (Boolean, _Form("boolean", plain)),
    (BigInteger, _Form("bigint", plain)),
    (Integer, _Form("integer", plain)),
    (LargeBinary, _Form("bytea", binaries)),
)
_TEXT = _Form("text", texts)


def _form_of(column: Column[Any]) -> _Form:
    return next((form for kind, form in _FORMS if isinstance(column.type, kind)), _TEXT)
