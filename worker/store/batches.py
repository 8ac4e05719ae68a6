"""Batches of model requests: the lease of a pool, what goes into a batch, and how far it is.

A batch is changed only under the lease of its pool. What becomes of its requests is in `batch_requests`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, insert, select, text, update

from worker.ids import WorkerId, new_id
from worker.model.batches import (
    PendingRequest,
    Pool,
)
from worker.store import tables
from worker.store.batch_requests import is_item_id
from worker.store.bulk import among
from worker.store.dialect import Row, all_rows, chunks, database_now, insert_into

_items, _batches, _leases = tables.batch_items, tables.batches, tables.batch_leases
_live, _orgs = tables.live_runs, tables.orgs

# Requests of a pool that one look reads.
READ = 50_000
# Batches that one look advances.
ADVANCED = 100

# --- The lease of a pool. ---


@dataclass(frozen=True, slots=True)
class PoolLease:
    """The right to send the batches of a pool; `until` is by the database's clock."""

    pool: str
    worker_id: WorkerId
    fencing_token: int
    until: datetime


def take_lease(connection: Connection, pool: str, worker_id: WorkerId, lasts: timedelta) -> PoolLease | None:
    """Take or renew the lease of a pool; None while another worker has it."""
    now = database_now(connection)
    row = connection.execute(select(_leases).where(_leases.c.pool == pool).with_for_update()).first()
    until = now + lasts
    if row is None:
        values = {"pool": pool, "worker_id": worker_id, "fencing_token": 1, "until": until}
        statement = insert_into(connection, _leases).values(**values).on_conflict_do_nothing()
        made = connection.execute(statement.returning(_leases.c.pool)).first()
        return None if made is None else PoolLease(pool, worker_id, 1, until)
    if row.worker_id != worker_id and row.until > now:
        return None
    # One that has expired is another one, also for its last holder: it may have been frozen.
    token = row.fencing_token + (row.worker_id != worker_id or row.until <= now)
    changed = {"worker_id": worker_id, "fencing_token": token, "until": until}
    connection.execute(update(_leases).where(_leases.c.pool == pool).values(**changed))
    return PoolLease(pool, worker_id, token, until)


def release_lease(connection: Connection, lease: PoolLease) -> None:
    """Let another worker take the lease at once."""
    mine = (_leases.c.pool == lease.pool, _leases.c.worker_id == lease.worker_id)
    now = database_now(connection)
    token = _leases.c.fencing_token == lease.fencing_token
    connection.execute(update(_leases).where(*mine, token).values(until=now))


def holds(connection: Connection, lease: PoolLease) -> bool:
    """Whether a lease is still held, which is so until this transaction ends."""
    row = connection.execute(select(_leases).where(_leases.c.pool == lease.pool).with_for_update()).first()
    return (
        row is not None
        and (row.worker_id, row.fencing_token) == (lease.worker_id, lease.fencing_token)
        and row.until > database_now(connection)
    )


# --- Pooling. ---


def pending(connection: Connection, pool: str) -> list[PendingRequest]:
    """The requests of unfinished runs of active orgs that wait for a batch, oldest first."""
    columns = (_items.c.id, _items.c.org_id, _items.c.api, _items.c.own_key, _items.c.path, _items.c.model)
    query = (
        select(*columns, _items.c.betas, _items.c.size, _items.c.opened_at, _items.c.apart)
        .join(_live, _live.c.id == _items.c.run_id)
        .join(_orgs, _orgs.c.id == _items.c.org_id)
        .where(text("batch_items.state = 'pending'"), _items.c.pool == pool, _orgs.c.state == "active")
        .order_by(_items.c.opened_at)
        .limit(READ)
    )
    found = []
    for row in connection.execute(query):
        of = Pool(row.api, row.org_id if row.own_key else None, row.path, row.model, row.betas)
        found.append(PendingRequest(row.id, row.org_id, of, row.size, row.opened_at, row.apart))
    return found


def make_batch(connection: Connection, lease: PoolLease, listed: Sequence[PendingRequest]) -> str | None:
    """Put these requests into a batch, fenced; returns its id, or None if the lease is lost."""
    if not holds(connection, lease):
        return None
    pool, id_, now = listed[0].pool, new_id(), database_now(connection)
    taken = 0
    for part in chunks(sorted(one.id for one in listed)):
        still = (among(connection, _items.c.id, part), _items.c.state == "pending")
        taken += connection.execute(update(_items).where(*still).values(state="sent", batch_id=id_)).rowcount
    if not taken:
        return None
    connection.execute(
        insert(_batches).values(
            **{"id": id_, "pool": lease.pool, "api": pool.api, "org_id": pool.account, "path": pool.path},
            **{"model": pool.model, "betas": pool.betas, "state": "new", "requests": taken},
            **{"apart": listed[0].apart, "created_at": now, "next_at": now},
            fencing_token=lease.fencing_token,
        )
    )
    return id_


# --- Batches. ---


def due(connection: Connection, pool: str) -> list[Row]:
    """The unfinished batches of a pool that something may be done with now, those first that wait longest."""
    now = database_now(connection)
    query = select(_batches).where(text(f"batches.{tables.OPEN_BATCH}"), _batches.c.pool == pool)
    query = query.where(_batches.c.next_at <= now).order_by(_batches.c.next_at).limit(ADVANCED)
    return all_rows(connection, query)


def change(connection: Connection, lease: PoolLease, batch_id: str, given: Mapping[str, Any]) -> bool:
    """Change columns of a batch, fenced; returns whether the lease was held.

    `wait` is in seconds until the next look; a value of True is the time now.
    """
    if not holds(connection, lease):
        return False
    now = database_now(connection)
    stamped = {name: now if value is True else value for name, value in given.items() if name != "wait"}
    if "wait" in given:
        stamped["next_at"] = now + timedelta(seconds=given["wait"])
    of = _batches.c.id == batch_id
    connection.execute(update(_batches).where(of).values(**stamped, fencing_token=lease.fencing_token))
    if "sent_at" in stamped:
        in_batch = (_items.c.batch_id == batch_id, _items.c.state == "sent")
        connection.execute(update(_items).where(*in_batch).values(sent_at=stamped["sent_at"]))
    return True


def requests_of(connection: Connection, batch_id: str) -> list[Row]:
    """The requests of a batch that are not over and whose runs are unfinished, by id."""
    columns = (_items.c.id, _items.c.org_id, _items.c.run_id, _items.c.body)
    query = select(*columns).where(_items.c.batch_id == batch_id, _items.c.state == "sent")
    query = query.join(_live, _live.c.id == _items.c.run_id)
    return all_rows(connection, query.order_by(_items.c.id))


def open_of(connection: Connection, batch_id: str) -> list[str]:
    """The ids of the requests of a batch that are not over, in order."""
    query = select(_items.c.id).where(_items.c.batch_id == batch_id, _items.c.state == "sent")
    return list(connection.execute(query.order_by(_items.c.id)).scalars())


def are_of_batch(connection: Connection, batch_id: str, ids: Collection[str]) -> bool:
    """Whether one of these ids is that of a request which was put into this batch."""
    listed = [id_ for id_ in ids if is_item_id(id_)]
    if not listed:
        return False
    query = select(_items.c.id).where(among(connection, _items.c.id, listed), _items.c.batch_id == batch_id)
    return connection.execute(query.limit(1)).first() is not None


def known_ids(connection: Connection, ids: Collection[str]) -> set[str]:
    """Those of these ids of a provider that belong to batches of this installation."""
    query = select(_batches.c.provider_id).where(among(connection, _batches.c.provider_id, sorted(ids)))
    return set(connection.execute(query).scalars()) if ids else set()


def fail(connection: Connection, lease: PoolLease, batch_id: str, error: str, *, apart: bool) -> bool:
    """Fail a batch and let its requests wait for another one, fenced; returns whether the lease was held.

    Those whose run has ended are ended then, by `end_orphans`.
    """
    if not change(connection, lease, batch_id, {"state": "failed", "error": error}):
        return False
    of = (_items.c.batch_id == batch_id, _items.c.state == "sent")
    values = {"state": "pending", "batch_id": None, "sent_at": None, "apart": apart}
    connection.execute(update(_items).where(*of).values(**values))
    return True


def forget_batches(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Delete batches that ended longer than `age` ago; returns how many."""
    before = database_now(connection) - age
    old = select(_batches.c.id).where(
        _batches.c.state.in_(("done", "failed")), _batches.c.created_at < before
    )
    ids = connection.execute(old.order_by(_batches.c.id).limit(limit)).scalars().all()
    return (
        connection.execute(_batches.delete().where(among(connection, _batches.c.id, ids))).rowcount
        if ids
        else 0
    )
