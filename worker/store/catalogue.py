"""Catalogue: the handlers of the installed distributions, as child processes reported them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import Connection, delete, select

from worker.handlers.catalogue import HandlerEntry
from worker.runs.run import Declared
from worker.store import tables
from worker.store.dialect import Row, all_rows, upsert

_catalogue = tables.catalogue
_KEY = ("name", "distribution")
_COLUMNS = tuple(column.name for column in _catalogue.columns)
# More than any installation's plug-ins offer.
MOST = 10_000
_REPLACED = tuple(name for name in _COLUMNS if name not in _KEY)


def put(connection: Connection, entries: Iterable[HandlerEntry], *, at: datetime) -> None:
    """Store reported handlers, one row per name and distribution."""
    rows = [as_row(entry) | {"seen_at": at} for entry in entries]
    if rows:
        connection.execute(upsert(connection, _catalogue, _KEY, _REPLACED), rows)


def as_row(entry: HandlerEntry) -> Row:
    """A reported handler with the names of the columns."""
    row = {name: value for name, value in asdict(entry).items() if name in _COLUMNS}
    return row | {"scopes": sorted(entry.scopes)}


def forget(connection: Connection, distribution: str, *, but: Iterable[str] = ()) -> None:
    """Delete the rows of a distribution, except these names."""
    connection.execute(
        delete(_catalogue).where(
            _catalogue.c.distribution == distribution, _catalogue.c.name.not_in(sorted(but))
        )
    )


def offered(connection: Connection) -> set[tuple[str, str, str]]:
    """Distribution, version and name of every row."""
    query = select(_catalogue.c.distribution, _catalogue.c.version, _catalogue.c.name)
    return {(distribution, version, name) for distribution, version, name in connection.execute(query)}


def declared(connection: Connection) -> dict[str, Declared]:
    """Where each handler of any worker or host asks to run, without broken ones."""
    columns = (_catalogue.c.name, _catalogue.c.isolation, _catalogue.c.pool)
    query = select(*columns).where(_catalogue.c.error.is_(None)).limit(MOST)
    return {
        name: Declared("inline" if isolation == "inline" else "child", pool)
        for name, isolation, pool in connection.execute(query)
    }


def entries(connection: Connection, name: str | None = None) -> list[Row]:
    """All rows, or those of one name, by name and distribution; broken handlers too."""
    query = select(_catalogue).order_by(_catalogue.c.name, _catalogue.c.distribution)
    if name is not None:
        query = query.where(_catalogue.c.name == name)
    return all_rows(connection, query.limit(MOST))
