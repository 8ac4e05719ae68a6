"""Access tokens that all workers share: sealed, by a digest of what they were requested for.

Times are the database's. A reservation lets one process at a time request a new token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Delete, delete, or_, select, update

from worker.ids import AllOrgs, OrgId
from worker.store import tables
from worker.store.bulk import among, insert_many
from worker.store.dialect import Row, database_now, driver, insert_into, is_postgresql
from worker.store.sql.postgresql.arrays import Columns, binaries, plain, texts

_tokens, _credentials, _orgs = tables.access_tokens, tables.credentials, tables.orgs
# Rows of one DELETE.
BATCH = 1000

# `(SELECT …)` hides the length of an array, so that each row is looked up, in the order of ids.
# Without a token a row expires with its reservation.
RESERVE = """
INSERT INTO access_tokens AS t (id, org_id, issuer, version, expires_at, reserved_by, reserved_until)
SELECT u.id, u.org_id, u.issuer, u.version, u.until, %s, u.until
FROM (
  SELECT *, clock_timestamp() + make_interval(secs => seconds) AS until
  FROM unnest((SELECT %s::text[]), (SELECT %s::uuid[]), (SELECT %s::text[]), (SELECT %s::bigint[]),
    (SELECT %s::float8[])) AS r(id, org_id, issuer, version, seconds)
) u
ON CONFLICT (id) DO UPDATE SET reserved_by = excluded.reserved_by, reserved_until = excluded.reserved_until
  WHERE (t.reserved_until IS NULL OR t.reserved_until <= clock_timestamp()) AND t.version = excluded.version
RETURNING id
"""

RESERVED = Columns((texts, "id"), (plain, "org_id"), (texts, "issuer"), (plain, "version seconds"))

# A lock is waited for, and then the newest state of its row decides.
PUT = """
WITH usable AS MATERIALIZED (
  SELECT c.id FROM credentials c JOIN orgs o ON o.id = c.org_id
  WHERE c.id = ANY ((SELECT %s::uuid[])::uuid[]) AND c.state = 'active' AND o.state IN ('active', 'paused')
  ORDER BY c.id FOR SHARE
)
INSERT INTO access_tokens AS t
  (id, org_id, issuer, version, credential_id, sealed, key_id, received_at, expires_at)
SELECT u.id, u.org_id, u.issuer, 1, u.credential_id, u.sealed, u.key_id,
  now - make_interval(secs => u.received_ago), now + make_interval(secs => u.remaining)
FROM (SELECT clock_timestamp() AS now) n, usable
  JOIN unnest((SELECT %s::text[]), (SELECT %s::uuid[]), (SELECT %s::text[]), (SELECT %s::uuid[]),
    (SELECT %s::bytea[]), (SELECT %s::text[]), (SELECT %s::float8[]), (SELECT %s::float8[]))
    AS u(id, org_id, issuer, credential_id, sealed, key_id, received_ago, remaining)
  ON u.credential_id = usable.id
ORDER BY u.id
ON CONFLICT (id) DO UPDATE SET issuer = excluded.issuer, version = t.version + 1,
  credential_id = excluded.credential_id, sealed = excluded.sealed, key_id = excluded.key_id,
  received_at = excluded.received_at, expires_at = excluded.expires_at,
  reserved_by = NULL, reserved_until = NULL
RETURNING id
"""
# The columns of `PUT`, in its order.
PUT_COLUMNS: Mapping[str, Callable[[Iterable[Any]], str]] = {
    "id": texts,
    "org_id": plain,
    "issuer": texts,
    "credential_id": plain,
    "sealed": binaries,
    "key_id": texts,
    "received_ago": plain,
    "left": plain,
}


@dataclass(frozen=True, slots=True, order=True)
class Reservation:
    """A token that is to be requested: `version` is that of the row as it was read, or 0.

    The reservation lasts for `seconds`, unless it is renewed.
    """

    id: str
    org_id: OrgId
    issuer: str
    version: int
    seconds: float


class Stored(NamedTuple):
    """A row: `age` and `left` are seconds since its token was received and until that expires.

    Without a token `sealed` is None, and `left` is that of the reservation.
    """

    id: str
    org_id: OrgId
    version: int
    sealed: bytes | None
    key_id: str
    credential_id: str
    age: float
    left: float


def find(connection: Connection, ids: Sequence[str]) -> list[Stored]:
    """The rows with these ids."""
    columns = [_tokens.c[name] for name in Stored._fields[:-2]]
    query = select(*columns, _tokens.c.received_at, _tokens.c.expires_at)
    rows = connection.execute(query.where(among(connection, _tokens.c.id, ids))).all()
    now = database_now(connection)
    found = []
    for *kept, received_at, expires_at in rows:
        age = 0.0 if received_at is None else (now - received_at).total_seconds()
        found.append(Stored._make((*kept, age, (expires_at - now).total_seconds())))
    return found


def lives(connection: Connection, ids: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The age of each of these tokens and what is left of its life, in seconds."""
    query = select(_tokens.c.id, _tokens.c.received_at, _tokens.c.expires_at).where(
        among(connection, _tokens.c.id, ids), _tokens.c.sealed.is_not(None)
    )
    rows = connection.execute(query).all()
    now = database_now(connection)
    return {
        id_: ((now - received_at).total_seconds(), left)
        for id_, received_at, expires_at in rows
        if (left := (expires_at - now).total_seconds()) > 0
    }


def reserve(connection: Connection, wanted: Sequence[Reservation], *, holder: str) -> set[str]:
    """Reserve what no other process has reserved, and return the ids of it.

    Not what has another version by now: another process has just stored its token.
    """
    wanted = sorted(wanted)
    if is_postgresql(connection):
        reserved = driver(connection).execute(RESERVE, (holder, *RESERVED.of(wanted)))
        return {id_ for (id_,) in reserved}
    now = database_now(connection)
    rows = [
        {
            "id": each.id,
            "org_id": each.org_id,
            "issuer": each.issuer,
            "version": each.version,
            # Without a token it expires with the reservation.
            "expires_at": (until := now + timedelta(seconds=each.seconds)),
            "reserved_by": holder,
            "reserved_until": until,
        }
        for each in wanted
    ]
    statement = insert_into(connection, _tokens)
    is_free = or_(_tokens.c.reserved_until.is_(None), _tokens.c.reserved_until <= now)
    statement = statement.on_conflict_do_update(
        index_elements=["id"],
        set_={name: statement.excluded[name] for name in ("reserved_by", "reserved_until")},
        where=is_free & (_tokens.c.version == statement.excluded.version),
    )
    return set(connection.execute(statement.returning(_tokens.c.id), rows).scalars())


def renew(connection: Connection, ids: Sequence[str], *, holder: str, lasts: timedelta) -> None:
    """Extend reservations of `holder`."""
    mine = (among(connection, _tokens.c.id, ids), _tokens.c.reserved_by == holder)
    locked = connection.execute(select(_tokens.c.id).where(*mine).order_by(_tokens.c.id).with_for_update())
    until = database_now(connection) + lasts
    held = among(connection, _tokens.c.id, list(locked.scalars()))
    connection.execute(update(_tokens).where(held).values(reserved_until=until))


def release(connection: Connection, id: str, *, holder: str) -> None:
    """End a reservation of `holder`."""
    mine = (_tokens.c.id == id, _tokens.c.reserved_by == holder)
    connection.execute(update(_tokens).where(*mine).values(reserved_by=None, reserved_until=None))


def put(connection: Connection, tokens: Sequence[Row]) -> set[str]:
    """Store tokens, end their reservations, and return the ids of what is stored.

    Each has id, org_id, issuer, credential_id, sealed, key_id, and in seconds `received_ago` and `left`.
    Not of a credential that is no longer active, or of an org that is suspended or removed: both are
    locked here, so that a retirement deletes what was stored before it and nothing is stored after it.
    """
    # One statement changes a row once: of two tokens for one key, the last one.
    tokens = [each for each in {each["id"]: each for each in tokens}.values() if each["left"] > 0]
    used = {each["credential_id"] for each in tokens}
    if is_postgresql(connection):
        values = [form([each[name] for each in tokens]) for name, form in PUT_COLUMNS.items()]
        return {id_ for (id_,) in driver(connection).execute(PUT, (plain(sorted(used)), *values))}
    lock = (
        select(_credentials.c.id)
        .join(_orgs, _orgs.c.id == _credentials.c.org_id)
        .where(_credentials.c.id.in_(used))
        .where(_credentials.c.state == "active", _orgs.c.state.in_(("active", "paused")))
    )
    usable = set(connection.execute(lock).scalars())
    now = database_now(connection)
    columns = ("id", "org_id", "issuer", "credential_id", "sealed", "key_id")
    rows: list[Row] = [
        {name: each[name] for name in columns}
        | {
            "version": 1,
            "received_at": now - timedelta(seconds=each["received_ago"]),
            "expires_at": now + timedelta(seconds=each["left"]),
            "reserved_by": None,
            "reserved_until": None,
        }
        for each in tokens
        if each["credential_id"] in usable
    ]
    if not rows:
        return set()
    replaced = [name for name in rows[0] if name not in ("id", "org_id", "version")]
    insert_many(connection, _tokens, rows, key=["id"], replaced=replaced, counted="version")
    return {row["id"] for row in rows}


def drop(connection: Connection, id: str) -> None:
    """Delete one token."""
    connection.execute(delete(_tokens).where(_tokens.c.id == id))


def drop_of_org(connection: Connection, org_id: OrgId, credential_id: str | None = None) -> int:
    """Delete the tokens of an org, or of one of its credentials; returns how many."""
    query = delete(_tokens).where(_tokens.c.org_id == org_id)
    if credential_id is not None:
        query = query.where(_tokens.c.credential_id == credential_id)
    return connection.execute(query).rowcount


def drop_some(
    connection: Connection, _: AllOrgs, *, sealed_with: str | None = None, not_sealed_with: str | None = None
) -> int:
    """Delete a batch of tokens, by default of all; returns how many: less than BATCH if none is left."""
    condition: Any = _tokens.c.id.is_not(None)
    if sealed_with is not None:
        condition = _tokens.c.key_id == sealed_with
    elif not_sealed_with is not None:
        condition = _tokens.c.key_id != not_sealed_with
    return _delete_some(connection, condition)


def drop_expired(connection: Connection, _: AllOrgs) -> int:
    """Delete a batch of expired tokens that no process is requesting again; as `drop_some`."""
    now = database_now(connection)
    is_free = or_(_tokens.c.reserved_until.is_(None), _tokens.c.reserved_until < now)
    return _delete_some(connection, (_tokens.c.expires_at < now) & is_free)


def _delete_some(connection: Connection, condition: Any) -> int:
    some = select(_tokens.c.id).where(condition).order_by(_tokens.c.id).limit(BATCH)
    ids = list(connection.execute(some.with_for_update(skip_locked=True)).scalars())
    statement: Delete = delete(_tokens).where(_tokens.c.id.in_(ids))
    return connection.execute(statement).rowcount if ids else 0
