"""The list of handlers: what workers offer, and what hosts declare in their pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, exists, func, literal, null, select

from worker.ids import AllOrgs, OrgId, Scope
from worker.model.definitions.pools import DEFAULT_POOL
from worker.store import catalogue, tables
from worker.store.definitions import in_force
from worker.store.dialect import Row, all_rows
from worker.store.host_handlers import names_with_workers
from worker.store.lists.rows import Handler, columns_of

_catalogue, _handlers = tables.catalogue, tables.host_handlers
_definitions, _revisions, _orgs = tables.definitions, tables.definition_revisions, tables.orgs
# Rows of hosts of one pool that are listed, and bytes of their schemas: no pool crowds out another.
OF_POOL = 200
SCHEMA_BYTES = 1024 * 1024
MAX_HANDLERS = 10_000
_SCHEMAS = ("params_schema", "settings_schema")
_NAMES = columns_of(Handler)


def listed(
    connection: Connection, scope: Scope, *, name: str | None = None, most: int = MAX_HANDLERS
) -> list[Row]:
    """Handlers by name: the workers' first, then those that hosts declare, each once a pool and plug-in.

    An org sees those of its open definitions, and of hosts only where these run. Of a pool with many, the
    rows and schemas beyond a bound are left out, the schemas as if there were none.
    """
    of_workers = _of_workers(scope, name).order_by(_catalogue.c.name, _catalogue.c.distribution).limit(most)
    rows = all_rows(connection, of_workers)
    of_hosts = all_rows(connection, _of_hosts(scope, name).limit(most))
    return sorted(rows + of_hosts, key=lambda row: row["name"])[:most]


def handler_names(scope: Scope) -> Select[Any]:
    """The names of all handlers, or for one org those of its definitions, closed or not.

    What else is installed is other orgs' business.
    """
    if isinstance(scope, AllOrgs):
        return names_with_workers()
    handler = _revisions.c.spec["handler"].as_string()
    query = select(handler).select_from(_definitions).join(_revisions, in_force(_definitions))
    return query.where(_definitions.c.org_id == scope).distinct()


def _of_workers(scope: Scope, name: str | None) -> Select[Any]:
    own = {key: _catalogue.c[key] for key in _NAMES if key != "source"}
    query = _select(own | {"source": literal("worker")}).where(catalogue.OF_WORKERS)
    if name is not None:
        query = query.where(_catalogue.c.name == name)
    if not isinstance(scope, AllOrgs):
        handler = _revisions.c.spec["handler"].as_string()
        query = query.where(_catalogue.c.name.in_(_open_definitions(scope).with_only_columns(handler)))
    return query


def _of_hosts(scope: Scope, name: str | None) -> Select[Any]:
    """The newest declaration of each pool, name and distribution, within the bounds of a pool."""
    key = (_handlers.c.pool, _handlers.c.name, _handlers.c.distribution)
    newest = (_handlers.c.seen_at.desc(), _handlers.c.host_id)
    each = select(_handlers, func.row_number().over(partition_by=key, order_by=newest).label("nth"))
    if name is not None:
        each = each.where(_handlers.c.name == name)
    if not isinstance(scope, AllOrgs):
        each = each.where(
            exists(_open_definitions(scope).where(_runs_here()).correlate(_handlers)),
            _handlers.c.name.not_in(catalogue.names()),
        )
    one = each.subquery()
    order = (one.c.name, one.c.distribution)
    place = func.row_number().over(partition_by=one.c.pool, order_by=order).label("place")
    size = func.sum(one.c.bytes).over(partition_by=one.c.pool, order_by=order).label("size")
    some = select(*one.c, place, size).where(one.c.nth == 1).subquery()
    fits = some.c.size <= SCHEMA_BYTES
    schemas = {key: case((fits, some.c[key]), else_=null()) for key in _SCHEMAS}
    own = {key: some.c[key] for key in _NAMES if key != "source"}
    query = _select(own | schemas | {"source": literal("host")})
    return query.where(some.c.place <= OF_POOL).order_by(some.c.name, some.c.pool, some.c.distribution)


def _select(columns: Mapping[str, ColumnElement[Any]]) -> Select[Any]:
    """A query of these columns, in the order of the list."""
    return select(*(columns[key].label(key) for key in _NAMES))


def _open_definitions(org_id: OrgId) -> Select[Any]:
    query = select(literal(1)).select_from(_definitions).join(_revisions, in_force(_definitions))
    query = query.join(_orgs, _orgs.c.id == _definitions.c.org_id)
    return query.where(_definitions.c.org_id == org_id, _definitions.c.closed_at.is_(None))


def _runs_here() -> ColumnElement[bool]:
    """Whether a definition's runs are of the row's handler, in its pool."""
    handler, pool = (_revisions.c.spec[key].as_string() for key in ("handler", "pool"))
    place = func.coalesce(func.nullif(pool, ""), _orgs.c.pool, literal(DEFAULT_POOL))
    return and_(handler == _handlers.c.name, place == _handlers.c.pool)
