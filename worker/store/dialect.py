"""What differs between SQLite and PostgreSQL: the driver, the time, upserts, types of columns, hints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    DateTime,
    Executable,
    Select,
    String,
    Table,
    TypeDecorator,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import JSON, TypeEngine

from worker.clock import Clock, from_text, to_text
from worker.ids import AllOrgs, Scope

CLOCK = "clock"
# PostgreSQL's channel for hints.
CHANNEL = "orgworker"


def driver(connection: Connection) -> Any:
    """The driver's own connection, inside the same transaction.

    The hot statements are fixed text in batches: without SQLAlchemy they take half the time.
    """
    return connection.connection.driver_connection


def is_postgresql(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"


def database_now(connection: Connection) -> datetime:
    """The time that rows are compared with: PostgreSQL's clock, or the injected one on SQLite."""
    if is_postgresql(connection):
        now: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        return now
    return file_now(connection)


def file_now(connection: Connection) -> datetime:
    """The injected clock of a SQLite connection."""
    clock: Clock = connection.info[CLOCK]
    return clock.now()


def hint(connection: Connection) -> None:
    """Wake every worker that listens once this transaction is committed; SQLite's one worker polls.

    A hint only saves the wait until the next poll: it may be lost, late or unnecessary.
    """
    if is_postgresql(connection):
        # PostgreSQL sends equal notifications of one transaction once.
        driver(connection).execute("SELECT pg_notify(%s, '')", (CHANNEL,))


# A row whose columns only its query knows.
Row = dict[str, Any]
R = TypeVar("R")


def all_rows(connection: Connection, query: Executable) -> list[Row]:
    """All rows of a query."""
    return [dict(row) for row in connection.execute(query).mappings()]


def rows_as(kind: type[R], connection: Connection, query: Executable) -> list[R]:
    """All rows of a query whose columns are those of a `TypedDict`."""
    return cast(list[R], all_rows(connection, query))


def first_row(connection: Connection, query: Executable) -> Row | None:
    """The first row of a query, or None."""
    one = query.limit(1) if isinstance(query, Select) else query
    row = connection.execute(one).mappings().first()
    return None if row is None else dict(row)


def in_scope(org_id: ColumnElement[Any], scope: Scope) -> tuple[ColumnElement[bool], ...]:
    """The condition that a row is of the org of the scope; none if that is all orgs."""
    return () if isinstance(scope, AllOrgs) else (org_id == scope,)


def above(key: ColumnElement[Any], after: Any) -> tuple[ColumnElement[bool], ...]:
    """The condition that a row follows the page that ended with this key, the least first; none at first."""
    return () if after is None else (key > after,)


def below(key: ColumnElement[Any], after: Any) -> tuple[ColumnElement[bool], ...]:
    """The same with the greatest key first."""
    return () if after is None else (key < after,)


T = TypeVar("T")


def chunks(values: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    """The values in order, at most `size` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def insert_into(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if is_postgresql(connection) else sqlite.insert(table)


def upsert(
    connection: Connection, table: Table, key: Sequence[str], replaced: Sequence[str]
) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that sets the `replaced` columns of the row that already has this key."""
    statement = insert_into(connection, table)
    return statement.on_conflict_do_update(
        index_elements=list(key), set_={name: statement.excluded[name] for name in replaced}
    )


# All JSON is written in one form, so that its text can be compared on SQLite.
compact_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Id(TypeDecorator[str]):
    """A UUIDv7: `uuid` on PostgreSQL, 36 characters on SQLite, text in Python on both."""

    impl = String(36)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.UUID(as_uuid=False))
        return dialect.type_descriptor(String(36))


class Instant(TypeDecorator[datetime]):
    """An aware UTC time: `timestamptz` on PostgreSQL, sortable RFC 3339 text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(String(27))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return to_text(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return from_text(value) if isinstance(value, str) else value


def exact_json_type() -> TypeEngine[Any]:
    """JSON as it was written, on both databases: `jsonb` would change numbers and the order of keys."""
    return JSON(none_as_null=True)


def json_type() -> TypeEngine[Any]:
    """JSON text on SQLite, `jsonb` on PostgreSQL."""
    return JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
