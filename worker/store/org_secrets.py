"""Secrets of orgs, by name; their values stay sealed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from worker.ids import AllOrgs, OrgId
from worker.store import tables
from worker.store.bulk import among
from worker.store.dialect import Row, all_rows, first_row

_secrets = tables.org_secrets
# What it takes to open a value.
_SEALED = tuple(_secrets.c[name] for name in ("id", "org_id", "name", "generation", "sealed", "key_id"))


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
