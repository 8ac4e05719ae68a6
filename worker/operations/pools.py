"""Pools: list them with their rules, slots and backlog; forget stored rules."""

from __future__ import annotations

from worker.errors import NotFound
from worker.store import audit, pools
from worker.store.database import Database
from worker.store.dialect import Row


def list_pools(database: Database) -> list[Row]:
    """Every pool that is served, waited for or has rules, by name; see `store.pools.overview`."""
    with database.autocommit() as connection:
        return pools.overview(connection)


def forget_rules(database: Database, name: str, *, actor: str) -> Row:
    """Delete the stored rules of a pool, and return them.

    A worker with `[pools.NAME] requires` stores its own again when it starts.

    Raises:
        NotFound: no rules are stored for it.
    """
    with database.transaction() as connection:
        required = pools.forget_rules(connection, name)
        if required is None:
            raise NotFound(f"no rules are stored for pool {name}", fix="`pools list` shows the pools")
        detail = {"requires": dict(required)}
        entry = audit.Entry(None, "pool.forget_rules", name, detail)
        audit.record(connection, [entry], at=database.now(connection), actor=actor)
    return {"name": name, **detail}
