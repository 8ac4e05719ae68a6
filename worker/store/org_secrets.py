"""Secrets of orgs, by name: their values stay sealed; and, with those of credentials, what each key seals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from worker.ids import AllOrgs, OrgId
from worker.store import tables
from worker.store.bulk import among
from worker.store.dialect import Row, above, all_rows, first_row

_secrets = tables.org_secrets
# What the sealing of a value authenticates: it opens in no other row, and with no other binding.
_PLACE = ("org_id", "name", "generation", "origin", "header")
# What it takes to open a value.
_SEALED = tuple(_secrets.c[name] for name in ("id", *_PLACE, "sealed", "key_id"))


def place_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its value, which must be as it was when the value was sealed."""
    return {name: row[name] for name in _PLACE}


def find(connection: Connection, org_id: OrgId, name: str) -> Row | None:
    """One of the org's secrets, sealed, or None; its org must be locked if it is to be changed."""
    return first_row(connection, select(_secrets).where(_secrets.c.org_id == org_id, _secrets.c.name == name))


def add(connection: Connection, row: Mapping[str, Any]) -> None:
    """Insert a secret; the org must have none of that name."""
    connection.execute(insert(_secrets), dict(row))


def rotate(
    connection: Connection,
    org_id: OrgId,
    secret_id: str,
    *,
    generation: int,
    sealed: bytes,
    key_id: str,
    at: datetime,
    by: str,
) -> None:
    """Replace the value of a secret; the old one is gone."""
    connection.execute(
        update(_secrets)
        .where(_secrets.c.org_id == org_id, _secrets.c.id == secret_id)
        .values(generation=generation, sealed=sealed, key_id=key_id, rotated_at=at, rotated_by=by)
    )


def bind(
    connection: Connection,
    org_id: OrgId,
    secret_id: str,
    *,
    origin: str | None,
    header: str | None,
    sealed: bytes,
    key_id: str,
) -> None:
    """Replace the binding of a secret, and the same value sealed with it."""
    connection.execute(
        update(_secrets)
        .where(_secrets.c.org_id == org_id, _secrets.c.id == secret_id)
        .values(origin=origin, header=header, sealed=sealed, key_id=key_id)
    )


def remove(connection: Connection, org_id: OrgId, secret_id: str) -> None:
    """Delete a secret."""
    connection.execute(delete(_secrets).where(_secrets.c.org_id == org_id, _secrets.c.id == secret_id))


def destroy(connection: Connection, org_id: OrgId) -> int:
    """Delete all secrets of an org; returns how many."""
    return connection.execute(delete(_secrets).where(_secrets.c.org_id == org_id)).rowcount


def sealed_of(connection: Connection, wanted: Sequence[tuple[OrgId, str]]) -> dict[tuple[OrgId, str], Row]:
    """Secrets by org and name, sealed, without those that do not exist."""
    org_ids, names = {org_id for org_id, _ in wanted}, {name for _, name in wanted}
    query = select(*_SEALED).where(
        among(connection, _secrets.c.org_id, sorted(org_ids)),
        among(connection, _secrets.c.name, sorted(names)),
    )
    keys = set(wanted)
    rows = {(row["org_id"], row["name"]): row for row in all_rows(connection, query)}
    return {key: row for key, row in rows.items() if key in keys}


def names(connection: Connection, org_ids: Sequence[OrgId]) -> dict[OrgId, set[str]]:
    """The names of the secrets of these orgs; orgs without secrets are left out."""
    query = select(_secrets.c.org_id, _secrets.c.name).where(among(connection, _secrets.c.org_id, org_ids))
    found: dict[OrgId, set[str]] = {}
    for org_id, name in connection.execute(query):
        found.setdefault(org_id, set()).add(name)
    return found


def newest(connection: Connection, _: AllOrgs, *, limit: int) -> list[Row]:
    """The newest secrets, sealed, with the org's code as `org`."""
    query = select(*_SEALED, tables.orgs.c.code.label("org")).join(
        tables.orgs, tables.orgs.c.id == _secrets.c.org_id
    )
    return all_rows(connection, query.order_by(_secrets.c.id.desc()).limit(limit))


def sealed_by_key(connection: Connection, _: AllOrgs) -> dict[str, Counter[str]]:
    """The number of secrets that each key seals, by state; secrets of orgs are active."""
    found: dict[str, Counter[str]] = {}
    of, secrets = tables.credentials.c, tables.org_secrets.c
    by_state = select(of.key_id, of.state, func.count()).where(of.sealed.is_not(None))
    for key_id, state, count in connection.execute(by_state.group_by(of.key_id, of.state)):
        found.setdefault(key_id, Counter())[state] += count
    by_key = select(secrets.key_id, func.count()).group_by(secrets.key_id)
    for key_id, count in connection.execute(by_key):
        found.setdefault(key_id, Counter())["active"] += count
    return found


def sealed_otherwise(
    connection: Connection, _: AllOrgs, table: Table, key_id: str, *, after: str | None, limit: int
) -> list[Row]:
    """Rows of one of the tables that are sealed with another key, locked: a page by id, after `after`."""
    query = select(*(table.c[of.name] for of in _SEALED if of.name in table.c))
    query = query.where(table.c.sealed.is_not(None), table.c.key_id != key_id, *above(table.c.id, after))
    return all_rows(connection, query.order_by(table.c.id).limit(limit).with_for_update())


def reseal(
    connection: Connection, table: Table, org_id: OrgId, row_id: str, sealed: bytes, key_id: str
) -> None:
    """Store the same value, sealed with another key."""
    mine = (table.c.org_id == org_id, table.c.id == row_id)
    connection.execute(update(table).where(*mine).values(sealed=sealed, key_id=key_id))
