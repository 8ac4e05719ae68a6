"""Secrets by the key that seals them: those of credentials, and those of orgs for their handlers."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, Table, func, select, update

from worker.ids import AllOrgs, OrgId
from worker.store import tables
from worker.store.dialect import Row, above, all_rows


def counts(connection: Connection, _: AllOrgs) -> dict[str, Counter[str]]:
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


def otherwise(
    connection: Connection, _: AllOrgs, table: Table, key_id: str, *, after: str | None, limit: int
) -> list[Row]:
    """Rows of one of the tables that are sealed with another key, locked: a page by id, after `after`."""
    names = ("id", "org_id", "name", "generation", "sealed", "key_id")
    query = select(*(table.c[name] for name in names if name in table.c))
    query = query.where(table.c.sealed.is_not(None), table.c.key_id != key_id, *above(table.c.id, after))
    return all_rows(connection, query.order_by(table.c.id).limit(limit).with_for_update())


def reseal(
    connection: Connection, table: Table, org_id: OrgId, row_id: str, sealed: bytes, key_id: str
) -> None:
    """Store the same value, sealed with another key."""
    mine = (table.c.org_id == org_id, table.c.id == row_id)
    connection.execute(update(table).where(*mine).values(sealed=sealed, key_id=key_id))
