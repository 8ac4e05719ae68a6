"""Handlers that hosts declare, stored for each token. `host_grants.py` has what an incarnation may do.

They are looked at for runs that are in the host's pool already, and place none. A handler that workers have
is theirs. `handlers/ceiling.py` says what of a declaration is granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    and_,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    union,
    update,
)

from worker.errors import LeaseLost
from worker.handlers.catalogue import HandlerEntry
from worker.ids import WorkerId
from worker.model.runs.hosts import MAX_HANDLERS, TooManyHandlers
from worker.model.runs.run import Declared, Isolation
from worker.store import catalogue, tables
from worker.store.dialect import Row, chunks, compact_json, database_now, upsert
from worker.store.health import holds_lease

_handlers, _hosts, _workers = tables.host_handlers, tables.hosts, tables.workers
_approvals = tables.pool_approvals
_KEY = tuple(column.name for column in _handlers.primary_key.columns)
_REPLACED = tuple(column.name for column in _handlers.columns if column.name not in _KEY)
# Bytes of all that one token may declare.
MAX_BYTES = 4 * 1024 * 1024
# How long a declaration is kept that its host no longer makes, and how exactly that is known.
KEPT = timedelta(days=30)
SEEN_EVERY = timedelta(days=1)
# Rows that one reader looks at.
MAX_ROWS = 10_000
# Rows of hosts that have their token, and are still in this pool.
VALID = and_(
    _hosts.c.id == _handlers.c.host_id, _hosts.c.pool == _handlers.c.pool, _hosts.c.removed_at.is_(None)
)


def report(connection: Connection, worker_id: WorkerId, entries: Iterable[HandlerEntry]) -> None:
    """Store what an incarnation of a host declares, besides what it declared before.

    Raises:
        TooManyHandlers: it is more than one token may declare; nothing is stored.
        LeaseLost: the incarnation is not, or no longer, that of a host.
    """
    mine = _workers.c.id == worker_id
    host_id: str | None = connection.execute(select(_workers.c.host_id).where(mine)).scalar()
    # Two calls of one token store one after the other, so that both count the same rows.
    kept = (_hosts.c.id == host_id, _hosts.c.removed_at.is_(None))
    pool = connection.execute(select(_hosts.c.pool).where(*kept).with_for_update()).scalar()
    if host_id is None or pool is None:
        raise LeaseLost("this incarnation is not one of a host")
    named = {(entry.name, entry.distribution): entry for entry in entries}
    at = database_now(connection)
    rows = [_row(entry) | {"pool": pool, "host_id": host_id, "seen_at": at} for entry in named.values()]
    _make_room(connection, host_id, pool, {key: row["bytes"] for key, row in zip(named, rows, strict=True)})
    connection.execute(upsert(connection, _handlers, _KEY, _REPLACED), rows)
    before = connection.execute(select(_workers.c.handlers, _workers.c.offers).where(mine)).one()
    usable = [row for row in rows if row["error"] is None]
    offers = (before.offers or {}) | {row["name"]: _offer(row) for row in usable}
    connection.execute(
        update(_workers).where(mine).values(handlers=sorted({*before.handlers, *offers}), offers=offers)
    )


def _row(entry: HandlerEntry) -> Row:
    row = catalogue.as_row(entry)
    del row["pool"]  # where its runs are is not the host's to say
    return row | {"bytes": len(compact_json(row).encode())}


def _offer(row: Row) -> Row:
    return {name: row[name] for name in catalogue.DECLARED if name not in ("name", "error")}


def _make_room(connection: Connection, host_id: str, pool: str, added: dict[tuple[str, str], int]) -> None:
    """Raise TooManyHandlers if these rows do not fit, after deleting those that no live incarnation has."""
    other = (_handlers.c.host_id == host_id, _handlers.c.pool != pool)
    connection.execute(delete(_handlers).where(*other))
    columns = (_handlers.c.name, _handlers.c.distribution, _handlers.c.bytes)
    query = select(*columns).where(_handlers.c.host_id == host_id)
    stored = {(name, distribution): size for name, distribution, size in connection.execute(query)}
    if _fits(stored | added):
        return
    alive = holds_lease(database_now(connection))
    live = select(_workers.c.handlers).where(_workers.c.host_id == host_id, alive)
    listed = {name for names in connection.execute(live).scalars() for name in names}
    gone = [key for key in stored if key[0] not in listed and key not in added]
    if not _fits({key: size for key, size in (stored | added).items() if key not in gone}):
        raise TooManyHandlers(
            f"handlers: one host may declare {MAX_HANDLERS} handlers, and "
            f"{MAX_BYTES // 1024**2} MiB of declarations"
        )
    for part in chunks(sorted({name for name, _ in gone})):
        connection.execute(
            delete(_handlers).where(_handlers.c.host_id == host_id, _handlers.c.name.in_(part))
        )


def _fits(rows: Mapping[tuple[str, str], int]) -> bool:
    return len(rows) <= MAX_HANDLERS and sum(rows.values()) <= MAX_BYTES


def forget_host(connection: Connection, host_id: str) -> None:
    """Delete what a host declares: its token is removed."""
    connection.execute(delete(_handlers).where(_handlers.c.host_id == host_id))


def forget_unseen(connection: Connection, age: timedelta = KEPT) -> int:
    """Delete what hosts have not declared for this long, or whose token is removed; returns how many rows.

    A live incarnation still declares what it has declared since its start.
    """
    now = database_now(connection)
    mine = (_workers.c.host_id == _handlers.c.host_id, _workers.c.started_at <= _handlers.c.seen_at)
    still = exists().where(*mine, holds_lease(now))
    connection.execute(
        update(_handlers).where(_handlers.c.seen_at < now - SEEN_EVERY, still).values(seen_at=now)
    )
    has_token = exists().where(VALID)
    return connection.execute(
        delete(_handlers).where(or_(_handlers.c.seen_at < now - age, ~has_token))
    ).rowcount


def names_with_workers() -> Select[Any]:
    """A query of the names of all handlers, of workers and of hosts."""
    both = union(catalogue.names(), select(_handlers.c.name)).subquery()
    return select(both.c.name)


def isolations(connection: Connection) -> dict[str, dict[str, Isolation]]:
    """Where hosts run a handler inline, by name and pool: only if all hosts of that pool say so."""
    found: dict[str, dict[str, Isolation]] = {}
    inline = func.min(case((_handlers.c.isolation == "inline", 1), else_=0)) == 1
    query = select(_handlers.c.name, _handlers.c.pool).where(_handlers.c.error.is_(None))
    query = query.group_by(_handlers.c.name, _handlers.c.pool).having(inline).limit(MAX_ROWS)
    for name, pool in connection.execute(query):
        found.setdefault(name, {})[pool] = "inline"
    return found


def declared(connection: Connection) -> dict[str, Declared]:
    """Where each handler asks to run: those of workers, and others as the hosts of each pool run them."""
    on_hosts = {name: Declared(on_hosts=pools) for name, pools in isolations(connection).items()}
    return on_hosts | catalogue.declared(connection)
