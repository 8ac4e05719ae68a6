"""Pools: list them with their rules, slots and backlog; forget stored rules."""

from __future__ import annotations

from worker.errors import NotFound
from worker.store import audit, pools
from worker.store.database import Database
from worker.store.dialect import Row


def list_pools(database: Database) -> list[Row]:
    """Every pool that a worker or host serves, a run waits for or rules are stored for, by name.

    Runs are counted up to `store.pools.MOST`. `slots` counts those of a worker of several pools for each.
    """
    with database.autocommit() as connection:
        stored = {row["name"]: row for row in pools.stored(connection)}
        serving = pools.serving(connection)
        waiting, running = pools.waiting(connection), pools.running(connection)
        of_hosts = pools.of_hosts(connection)
    slots = pools.slots_of(serving)
    rows = []
    for name in sorted({*stored, *waiting, *running, *of_hosts, *slots}):
        mine = [row for row in serving if name in row["pools"]]
        rules = stored.get(name)
        rows.append(
            {
                "name": name,
                "requires": rules["requires"] if rules else {},
                "waiting": waiting.get(name, 0),
                "running": running.get(name, 0),
                "workers": sum(row["host_id"] is None for row in mine),
                "hosts": sum(row["host_id"] is not None for row in mine),
                "slots": slots[name],
                "changed_at": rules and rules["changed_at"],
                "changed_by": rules and rules["changed_by"],
            }
        )
    return rows


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
