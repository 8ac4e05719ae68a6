"""Approvals: what hosts of a pool declare beyond the defaults, and what an administrator approved of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import Connection, delete, select, update

from worker.definitions.units import format_duration
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import KEYS, Ceiling, allowed, digest, excess
from worker.store import catalogue, host_grants, host_handlers, tables
from worker.store.dialect import Row, all_rows, chunks, database_now, first_row, hint, upsert

_approvals, _hosts, _handlers = tables.pool_approvals, tables.hosts, tables.host_handlers
_live = tables.live_runs
_REPLACED = ("digest", "ceiling", "approved_at", "approved_by")
# Hosts and approvals, more than any installation has.
MAX_ROWS = 10_000
# Runs that an approval lets start at once; others wait a little longer.
WOKEN = 10_000


def declared_by_hosts(connection: Connection, pool: str | None = None) -> list[Row]:
    """What hosts declare of each handler, by pool and handler; one row for each content.

    `hosts` are the names of those that declare it. `beyond` are the keys in which it goes beyond what needs
    no approval, empty if it needs none; `pending` those that nothing approved covers. `approved_at` and
    `approved_by` are of the approval of that pool and handler, whatever it covers.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for of_pool, host, entry in _declarations(connection, pool):
        ceiling = Ceiling.of(entry)
        key = (of_pool, entry.name, digest(of_pool, entry.name, ceiling))
        row = found.setdefault(key, {"ceiling": ceiling, "entry": entry, "hosts": set()})
        row["hosts"].add(host)
    of_workers = catalogue.of_workers(connection, {name for _, name, _ in found})
    known = {(row["pool"], row["handler"]): row for row in approvals(connection)}
    return [
        _shown(key, row, of_workers.get(key[1], []), known.get(key[:2])) for key, row in sorted(found.items())
    ]


def _shown(key: tuple[str, str, str], row: Row, of_workers: list[HandlerEntry], approval: Row | None) -> Row:
    (pool, handler, of_digest), entry, ceiling = key, row["entry"], row["ceiling"]
    theirs = host_grants.workers_entry(of_workers, entry.distribution)
    free = None if theirs is None else Ceiling.of(theirs)
    approved = None if approval is None else Ceiling.from_json(approval["ceiling"])
    beyond, pending = excess(ceiling, allowed(free)), excess(ceiling, allowed(free, approved))
    return {
        "pool": pool,
        "handler": handler,
        "distribution": entry.distribution,
        "version": entry.version,
        "digest": of_digest,
        "secrets": sorted(ceiling.secrets),
        "scopes": sorted(ceiling.scopes),
        "timeout": format_duration(ceiling.timeout),
        "max_attempts": ceiling.max_attempts,
        "max_concurrent": ceiling.max_concurrent,
        "hosts": sorted(row["hosts"]),
        "of_workers": bool(of_workers),
        "beyond": [name for name in KEYS if name in beyond],
        "pending": [name for name in KEYS if name in beyond & pending],
        "approved": not beyond & pending,
        "approved_at": approval and approval["approved_at"],
        "approved_by": approval and approval["approved_by"],
    }


def _declarations(connection: Connection, pool: str | None) -> Iterator[tuple[str, str, HandlerEntry]]:
    """Pool, host and handler of all that is stored, and of what live incarnations declare otherwise."""
    columns = (_handlers.c[name] for name in ("pool", *catalogue.DECLARED))
    query = select(_hosts.c.name.label("host"), *columns).join(_hosts, host_handlers.VALID)
    query = query.where(_handlers.c.error.is_(None))
    if pool is not None:
        query = query.where(_handlers.c.pool == pool)
    for row in all_rows(connection, query.order_by(_handlers.c.seen_at).limit(host_handlers.MAX_ROWS)):
        yield row["pool"], row["host"], catalogue.entry_of(row)
    # Of two versions under one token, as in a rolling update, the table has the one that reported last.
    names = {
        id_: name for id_, name in connection.execute(select(_hosts.c.id, _hosts.c.name).limit(MAX_ROWS))
    }
    live = [one for one in host_grants.live_incarnations(connection) if one.host_id in names]
    live = [one for one in live if one.pools and pool in (None, one.pools[0])]
    declared = host_grants.declarations(connection, live)
    for one in live:
        for entry in declared[one.id].values():
            if entry.distribution:
                yield one.pools[0], names[one.host_id or ""], entry


def approvals(connection: Connection) -> list[Row]:
    """All approvals, by pool and handler; `ceiling` is JSON."""
    query = select(_approvals).order_by(_approvals.c.pool, _approvals.c.handler)
    return all_rows(connection, query.limit(MAX_ROWS))


def approve(
    connection: Connection, pool: str, handler: str, of_digest: str, *, by: str, at: datetime
) -> Row | None:
    """Approve what hosts of the pool declare with this digest, in place of an earlier approval.

    Returns the approval. None, and nothing changes, if no host declares that (any more).
    """
    for of_pool, _, entry in _declarations(connection, pool):
        ceiling = Ceiling.of(entry)
        if entry.name == handler and digest(of_pool, handler, ceiling) == of_digest:
            break
    else:
        return None
    key = {"pool": pool, "handler": handler}
    given = {"digest": of_digest, "ceiling": ceiling.as_json(), "approved_at": at, "approved_by": by}
    connection.execute(upsert(connection, _approvals, tuple(key), _REPLACED), key | given)
    _wake(connection, pool)
    return key | given


def approved(connection: Connection, pool: str, handler: str) -> Row | None:
    """The approval of a handler in a pool."""
    query = select(_approvals).where(_approvals.c.pool == pool, _approvals.c.handler == handler)
    return first_row(connection, query)


def revoke(connection: Connection, pool: str, handler: str) -> bool:
    """Delete the approval of a handler in a pool; returns whether there was one."""
    mine = (_approvals.c.pool == pool, _approvals.c.handler == handler)
    return bool(connection.execute(delete(_approvals).where(*mine)).rowcount)


def _wake(connection: Connection, pool: str) -> None:
    """Make the runs of a pool due that wait for an approval."""
    now = database_now(connection)
    waiting = (_live.c.state == "waiting", _live.c.reason == "not_approved", _live.c.pool == pool)
    query = select(_live.c.id).where(*waiting, _live.c.available_at > now).order_by(_live.c.id).limit(WOKEN)
    ids = connection.execute(query.with_for_update(skip_locked=True)).scalars().all()
    for part in chunks(ids):
        connection.execute(update(_live).where(_live.c.id.in_(part)).values(available_at=now))
    hint(connection)
