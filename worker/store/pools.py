"""Pools: the rules that all workers enforce, and who serves a pool."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, delete, select

from worker.claims.pools import Rules
from worker.store import tables
from worker.store.dialect import Row, database_now, first_row, upsert

_pools = tables.pools
_REPLACED = ("requires", "changed_at", "changed_by")


def rules(connection: Connection) -> Rules:
    """The stored rules of all pools."""
    return {name: requires for name, requires in connection.execute(select(_pools.c.name, _pools.c.requires))}


def store_rules(connection: Connection, own: Rules, *, by: str) -> tuple[Rules, list[str]]:
    """Store the rules of a worker that starts; returns all stored rules, and the pools that changed."""
    stored = dict(rules(connection))
    changed = sorted(pool for pool, required in own.items() if stored.get(pool) != required)
    if changed:
        at = database_now(connection)
        rows = [
            {"name": pool, "requires": dict(own[pool]), "changed_at": at, "changed_by": by}
            for pool in changed
        ]
        connection.execute(upsert(connection, _pools, ("name",), _REPLACED), rows)
    return stored | {pool: own[pool] for pool in changed}, changed


def forget_rules(connection: Connection, pool: str) -> Mapping[str, str] | None:
    """Delete the stored rules of a pool and return them; None if it has none."""
    row: Row | None = first_row(connection, select(_pools).where(_pools.c.name == pool).with_for_update())
    if row is None:
        return None
    connection.execute(delete(_pools).where(_pools.c.name == pool))
    required: Mapping[str, str] = row["requires"]
    return required
