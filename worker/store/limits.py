"""Limits of calls to other services: definitions, shares of what workers use, and pauses.

Only these tables are locked, in the order of ids, and never by what fires, admits or ends runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from sqlalchemy import Connection, delete, insert, select, update

from worker.clock import EPOCH
from worker.ids import AllOrgs, OrgId, new_id
from worker.model.definitions.limits import limit_of
from worker.model.limits import MAX_PAUSE, Ask, Bucket, BucketKey, Limit, Share, answer, new_bucket
from worker.store import tables
from worker.store.bulk import among, insert_many
from worker.store.dialect import Row, all_rows, chunks, database_now, insert_into

_limits, _shares, _pauses = tables.limits, tables.limit_shares, tables.origin_pauses

# The most pauses that a worker keeps.
MAX_PAUSES = 10_000
# Seconds that the row of a key is kept that is not in use any more.
KEPT = 10.0
# Rows that one cleanup deletes.
BATCH = 1_000


# --- Definitions. ---


def every(connection: Connection, *, lock: bool = False) -> dict[tuple[str, str], Row]:
    """All limits, by origin and `per`."""
    query = select(_limits).order_by(_limits.c.id)
    rows = all_rows(connection, query.with_for_update() if lock else query)
    return {(row["origin"], row["per"]): row for row in rows}


def put(
    connection: Connection, values: Mapping[str, Any], before: Row | None, *, at: datetime, actor: str
) -> None:
    """Insert a limit, or change the one that is there."""
    changed = {**values, "updated_at": at, "updated_by": actor}
    if before is None:
        connection.execute(insert(_limits).values(id=new_id(), created_at=at, **changed))
    else:
        connection.execute(update(_limits).where(_limits.c.id == before["id"]).values(**changed))


def remove(connection: Connection, limit_id: str) -> None:
    """Delete a limit, and what workers use of it; those that still ask get what they want."""
    connection.execute(delete(_shares).where(_shares.c.limit_id == limit_id))
    connection.execute(delete(_limits).where(_limits.c.id == limit_id))


def load(connection: Connection, limit_ids: Collection[str] | None = None) -> dict[str, Limit]:
    """Limits as workers use them, by id: those of these ids, or all."""
    query = select(_limits)
    if limit_ids is not None:
        query = query.where(among(connection, _limits.c.id, sorted(limit_ids)))
    return {row["id"]: limit_of(row) for row in all_rows(connection, query)}


# --- Shares. ---


def share_id(key: BucketKey) -> str:
    """The id of the row of a key, which every worker computes."""
    return str(uuid5(UUID(key.limit_id), key.org_id or "all"))


def share(connection: Connection, asked: Sequence[tuple[str, Ask]]) -> list[Share | None]:
    """Answer the questions of holders, such as a worker; None for a key that has no row yet.

    A limit that no longer exists limits nothing. `add_rows` adds rows in a transaction of its own: an insert
    waits for that of another worker, and rows are locked in one order.
    """
    ids = [share_id(ask.key) for _, ask in asked]
    limits = load(connection, {ask.key.limit_id for _, ask in asked})
    buckets: dict[str, Bucket] = {}
    for part in chunks(sorted(set(ids))):
        rows = select(_shares.c.id, _shares.c.bucket).where(among(connection, _shares.c.id, part))
        for id_, bucket in connection.execute(rows.order_by(_shares.c.id).with_for_update()):
            buckets[id_] = Bucket.from_json(bucket)
    # The time is read once the rows are locked: for each of them it never goes back.
    at = seconds(database_now(connection))
    found: list[Share | None] = []
    changed: dict[str, dict[str, Any]] = {}
    for id_, (holder, ask) in zip(ids, asked, strict=True):
        limit = limits.get(ask.key.limit_id)
        if limit is None:
            found.append(Share(ask.want, ask.slots, at, pace=float(ask.want)))
        elif id_ not in buckets:
            found.append(None)
        else:
            found.append(answer(limit, buckets[id_], holder, ask, at))
            changed[id_] = _row(ask.key, buckets[id_], limit)
    insert_many(connection, _shares, list(changed.values()), key=("id",), replaced=("bucket", "idle_at"))
    return found


def add_rows(connection: Connection, keys: Collection[BucketKey]) -> None:
    """Add rows of keys that come into use, each with a full bucket."""
    limits = load(connection, {key.limit_id for key in keys})
    at = seconds(database_now(connection))
    rows = [
        _row(key, new_bucket(limits[key.limit_id], at), limits[key.limit_id])
        for key in keys
        if key.limit_id in limits
    ]
    insert_many(connection, _shares, sorted(rows, key=lambda row: row["id"]), key=("id",))


def _row(key: BucketKey, bucket: Bucket, limit: Limit) -> dict[str, Any]:
    return {
        "id": share_id(key),
        "limit_id": key.limit_id,
        "org_id": key.org_id,
        "bucket": bucket.as_json(),
        "idle_at": EPOCH + timedelta(seconds=min(bucket.idle_at(limit) + KEPT, _LAST)),
    }


# The last time that both databases store.
_LAST = (datetime(9999, 1, 1, tzinfo=UTC) - EPOCH).total_seconds()


def seconds(instant: datetime) -> float:
    """Seconds since 1970."""
    return (instant - EPOCH).total_seconds()


def forget_idle(connection: Connection) -> int:
    """Delete the rows of keys that are not in use, and pauses that are over; returns how many rows."""
    now = database_now(connection)
    deleted = 0
    for table, over in ((_shares, _shares.c.idle_at), (_pauses, _pauses.c.until)):
        keys = list(table.primary_key)
        # Skips what a worker uses now; deleting in the order of keys as it locks.
        rows = connection.execute(
            select(*keys).where(over < now).order_by(*keys).limit(BATCH).with_for_update(skip_locked=True)
        ).all()
        for row in rows:
            deleted += connection.execute(
                delete(table).where(*(key == value for key, value in zip(keys, row, strict=True)))
            ).rowcount
    return deleted


def forget_org(connection: Connection, org_id: OrgId) -> None:
    """Delete what an org uses, and its pauses."""
    for table in (_shares, _pauses):
        connection.execute(delete(table).where(table.c.org_id == org_id))


# --- Pauses. ---


class Pause(NamedTuple):
    """An org whose requests to a service pause for these seconds."""

    org_id: str
    origin: str
    seconds: float


def pause(connection: Connection, asked: Sequence[Pause]) -> None:
    """Store pauses; one that ends earlier than a stored one changes nothing."""
    now = database_now(connection)
    longest: dict[tuple[str, str], float] = {}
    for each in asked:
        place = each.org_id, each.origin
        longest[place] = max(longest.get(place, 0.0), min(max(each.seconds, 0.0), MAX_PAUSE))
    statement = insert_into(connection, _pauses)
    statement = statement.on_conflict_do_update(
        index_elements=["org_id", "origin"],
        set_={"until": statement.excluded.until, "paused_at": statement.excluded.paused_at},
        where=_pauses.c.until < statement.excluded.until,
    )
    rows = [
        {"org_id": org_id, "origin": origin, "until": now + timedelta(seconds=most), "paused_at": now}
        for (org_id, origin), most in sorted(longest.items())
    ]
    if rows:
        connection.execute(statement, rows)


def pauses(connection: Connection, _: AllOrgs) -> list[Pause]:
    """The pauses of all orgs that are not over, those that end last first, with the seconds that are left."""
    now = database_now(connection)
    query = select(_pauses.c.org_id, _pauses.c.origin, _pauses.c.until).where(_pauses.c.until > now)
    rows = connection.execute(query.order_by(_pauses.c.until.desc()).limit(MAX_PAUSES))
    return [Pause(org_id, origin, (until - now).total_seconds()) for org_id, origin, until in rows]
