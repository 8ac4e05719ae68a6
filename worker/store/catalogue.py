"""Catalogue: the handlers of the workers' distributions, as child processes reported them.

What hosts declare is in `host_handlers.py`. The previous release stored both in this table: of its rows,
whose `of_worker` is null, those count that a worker lists, until this release has read the handler.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, ColumnElement, Connection, Select, delete, select
from sqlalchemy.ext.compiler import compiles

from worker.handlers.catalogue import HandlerEntry
from worker.model.runs.run import Declared
from worker.store import tables
from worker.store.bulk import rows_among
from worker.store.dialect import Row, all_rows, database_now, upsert
from worker.store.health import holds_lease

_catalogue, _workers = tables.catalogue, tables.workers
_KEY = ("name", "distribution")
_COLUMNS = tuple(column.name for column in _catalogue.columns)
# More than any installation's plug-ins offer.
MAX_ENTRIES = 10_000
_REPLACED = tuple(name for name in _COLUMNS if name not in _KEY)
# What tells how a handler runs, without its schemas.
DECLARED = (
    *("name", "distribution", "version", "entry_point", "isolation", "scopes", "timeout", "max_attempts"),
    *("memory", "max_concurrent", "state", "secrets", "egress", "audiences", "children", "error"),
)
_ENTRY = frozenset(each.name for each in fields(HandlerEntry))


class _OfWorkers(ColumnElement[bool]):
    """Whether a row of `catalogue` is of a handler that a worker offers or offered."""

    inherit_cache = True
    type = Boolean()


_CONDITION = """(catalogue.of_worker OR catalogue.of_worker IS NULL
 AND catalogue.name NOT IN (SELECT read.name FROM catalogue read WHERE read.of_worker)
 AND catalogue.name IN ({listed}))"""
_LISTED = {
    "postgresql": "SELECT jsonb_array_elements_text(w.handlers) FROM workers w WHERE w.host_id IS NULL",
    "sqlite": "SELECT j.value FROM workers w, json_each(w.handlers) j WHERE w.host_id IS NULL",
}


@compiles(_OfWorkers)
def _of_workers(element: _OfWorkers, compiler: Any, **_: Any) -> str:
    return _CONDITION.format(listed=_LISTED[compiler.dialect.name])


# Every reader of the table has this condition: all other rows are claims of hosts.
OF_WORKERS: ColumnElement[bool] = _OfWorkers()


def put(connection: Connection, entries: Iterable[HandlerEntry], *, at: datetime) -> None:
    """Store handlers that a worker or command has read, one row per name and distribution."""
    rows = [as_row(entry) | {"seen_at": at, "of_worker": True} for entry in entries]
    if rows:
        connection.execute(upsert(connection, _catalogue, _KEY, _REPLACED), rows)


def as_row(entry: HandlerEntry) -> Row:
    """A reported handler with the names of the columns."""
    row = {name: value for name, value in asdict(entry).items() if name in _COLUMNS}
    egress = None if entry.egress is None else list(entry.egress)
    return (
        row
        | {"scopes": sorted(entry.scopes), "egress": egress, "audiences": list(entry.audiences)}
        | {"children": list(entry.children)}
    )


def entry_of(row: Row) -> HandlerEntry:
    """The handler of a row; columns that the row lacks are as if they were not declared."""
    entry = HandlerEntry(**{name: value for name, value in row.items() if name in _ENTRY})
    return replace(
        entry,
        scopes=tuple(entry.scopes),
        secrets=tuple(entry.secrets),
        egress=None if entry.egress is None else tuple(entry.egress),
        audiences=tuple(entry.audiences),
        children=tuple(entry.children),
    )


def forget(connection: Connection, distribution: str, *, but: Iterable[str] = ()) -> None:
    """Delete the rows of a distribution, except these names."""
    connection.execute(
        delete(_catalogue).where(
            _catalogue.c.distribution == distribution, _catalogue.c.name.not_in(sorted(but))
        )
    )


def forget_name(connection: Connection, name: str) -> int:
    """Delete all rows of a handler and return how many: it is then no longer the workers'."""
    return connection.execute(delete(_catalogue).where(_catalogue.c.name == name)).rowcount


def offering(connection: Connection, name: str) -> list[str]:
    """The machines of the live workers that offer a handler."""
    alive = (_workers.c.host_id.is_(None), holds_lease(database_now(connection)))
    query = select(_workers.c.host, _workers.c.handlers).where(*alive)
    return sorted({host for host, names in connection.execute(query) if name in names})


def offered(connection: Connection) -> set[tuple[str, str, str]]:
    """Distribution, version and name of every row that a worker or command of this release has read."""
    query = select(_catalogue.c.distribution, _catalogue.c.version, _catalogue.c.name)
    query = query.where(_catalogue.c.of_worker)
    return {(distribution, version, name) for distribution, version, name in connection.execute(query)}


def declared(connection: Connection) -> dict[str, Declared]:
    """Where each handler of any worker asks to run, without broken ones."""
    columns = (_catalogue.c.name, _catalogue.c.isolation, _catalogue.c.pool)
    query = select(*columns).where(OF_WORKERS, _catalogue.c.error.is_(None))
    # Of several distributions the first, as `entries` has them.
    query = query.order_by(_catalogue.c.name.desc(), _catalogue.c.distribution.desc()).limit(MAX_ENTRIES)
    return {
        name: Declared("inline" if isolation == "inline" else "child", pool)
        for name, isolation, pool in connection.execute(query)
    }


def entries(connection: Connection, name: str | None = None) -> list[Row]:
    """The workers' rows, or those of one name, by name and distribution; broken handlers too."""
    query = select(_catalogue).where(OF_WORKERS).order_by(_catalogue.c.name, _catalogue.c.distribution)
    if name is not None:
        query = query.where(_catalogue.c.name == name)
    return all_rows(connection, query.limit(MAX_ENTRIES))


def names() -> Select[Any]:
    """A query of the names of the workers' handlers."""
    return select(_catalogue.c.name).where(OF_WORKERS).distinct()


def of_workers(connection: Connection, wanted: Collection[str]) -> dict[str, list[HandlerEntry]]:
    """The workers' own declarations of these handlers, the newest last; without schemas, broken ones too."""
    found: dict[str, list[HandlerEntry]] = {}
    for entry in _declarations(connection, wanted, OF_WORKERS):
        found.setdefault(entry.name, []).append(entry)
    return found


def reported_to_older(connection: Connection, wanted: Sequence[str]) -> dict[str, HandlerEntry]:
    """What hosts declared of these handlers to a worker of the previous release."""
    of_hosts = (_catalogue.c.of_worker.is_(None), _catalogue.c.error.is_(None))
    return {entry.name: entry for entry in _declarations(connection, wanted, *of_hosts)}


def _declarations(
    connection: Connection, names: Collection[str], *which: ColumnElement[bool]
) -> list[HandlerEntry]:
    """The rows of these handlers, without schemas; of each handler the newest last."""
    query = select(*(_catalogue.c[name] for name in DECLARED)).where(*which).order_by(_catalogue.c.seen_at)
    return [entry_of(row._asdict()) for row in rows_among(connection, query, _catalogue.c.name, names)]
