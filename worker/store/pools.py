"""Pools: the rules that all workers enforce, who serves a pool, and what waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, Connection, delete, func, literal_column, select

from worker.ids import ALL_ORGS
from worker.model.claims import Rules
from worker.model.definitions.pools import pool_of
from worker.model.runs.run import Declared
from worker.store import catalogue, health, tables
from worker.store.definitions import in_force, newest_open
from worker.store.dialect import Row, all_rows, database_now, first_row, upsert

_pools, _live, _workers, _hosts = tables.pools, tables.live_runs, tables.workers, tables.hosts
_revisions, _orgs = tables.definition_revisions, tables.orgs
_REPLACED = ("requires", "changed_at", "changed_by")
# Runs that are counted for the metric, and for people: of more, the numbers are too low.
MAX_COUNTED = 100_000
SHOWN = 10_000
# Pools, and workers and hosts that serve them: more than any installation has.
NAMES = 1_000
SERVING = 10_000


def rules(connection: Connection) -> Rules:
    """The stored rules of all pools."""
    query = select(_pools.c.name, _pools.c.requires).order_by(_pools.c.name).limit(NAMES)
    return {name: requires for name, requires in connection.execute(query)}


def store_rules(connection: Connection, own: Rules, *, by: str) -> tuple[Rules, list[str]]:
    """Store the rules of a worker that starts; returns all stored rules, and the pools that changed."""
    known = dict(rules(connection))
    changed = sorted(pool for pool, required in own.items() if known.get(pool) != required)
    if changed:
        at = database_now(connection)
        rows = [
            {"name": pool, "requires": dict(own[pool]), "changed_at": at, "changed_by": by}
            for pool in changed
        ]
        connection.execute(upsert(connection, _pools, ("name",), _REPLACED), rows)
    return known | {pool: own[pool] for pool in changed}, changed


def forget_rules(connection: Connection, pool: str) -> Mapping[str, str] | None:
    """Delete the stored rules of a pool and return them; None if it has none."""
    row = first_row(connection, select(_pools).where(_pools.c.name == pool).with_for_update())
    if row is None:
        return None
    connection.execute(delete(_pools).where(_pools.c.name == pool))
    required: Mapping[str, str] = row["requires"]
    return required


def of_hosts(connection: Connection) -> set[str]:
    """The pools of all hosts, also of those that are down."""
    query = select(_hosts.c.pool).where(_hosts.c.removed_at.is_(None)).limit(SERVING)
    return set(connection.execute(query).scalars())


def waiting(connection: Connection, most: int = MAX_COUNTED) -> dict[str, int]:
    """The runs of each pool that could start now if there were slots for them."""
    due = (_live.c.state == literal_column("'waiting'"), _live.c.available_at <= database_now(connection))
    return _count(connection, most, *due)


def running(connection: Connection) -> dict[str, int]:
    """The running runs of each pool."""
    return _count(connection, SHOWN, _live.c.state == literal_column("'running'"))


def _count(connection: Connection, most: int, *which: ColumnElement[bool]) -> dict[str, int]:
    some = select(_live.c.pool).where(*which).limit(most).subquery()
    query = select(some.c.pool, func.count()).group_by(some.c.pool).limit(NAMES)
    return {pool: count for pool, count in connection.execute(query)}


def of_definitions(connection: Connection) -> dict[str, str]:
    """The pools of open definitions of active orgs, each with one of these orgs."""
    pool, handler = (_revisions.c.spec[name].as_string() for name in ("pool", "handler"))
    newest = newest_open(ALL_ORGS)
    query = (
        select(_orgs.c.code, pool, handler, _orgs.c.pool)
        .select_from(newest)
        .join(_orgs, _orgs.c.id == newest.c.org_id)
        .join(_revisions, in_force(newest))
        .where(_orgs.c.state == "active")
        .order_by(newest.c.id)
    )
    declared = catalogue.declared(connection)
    found: dict[str, str] = {}
    for org, own, of_handler, of_org in connection.execute(query):
        wants = declared.get(of_handler, Declared())
        found.setdefault(pool_of(own, wants.pool, of_org), org)
    return found


def slots_of(workers: Sequence[Row]) -> Counter[str]:
    """The slots of the workers and hosts that serve each pool; those of several pools count for each."""
    found: Counter[str] = Counter()
    for row in workers:
        slots = sum(int((row["capacity"] or {}).get(kind, 0)) for kind in ("children", "inline"))
        found.update(dict.fromkeys(row["pools"], slots))
    return found


def overview(connection: Connection) -> list[Row]:
    """Every pool that a worker or host serves, a run waits for or rules are stored for, by name.

    Runs are counted up to `SHOWN`. `slots` counts those of a worker of several pools for each.
    """
    known = {
        row["name"]: row for row in all_rows(connection, select(_pools).order_by(_pools.c.name).limit(NAMES))
    }
    alive = health.live_workers(connection)
    due, busy = waiting(connection, SHOWN), running(connection)
    slots = slots_of(alive)
    rows = []
    for name in sorted({*known, *due, *busy, *of_hosts(connection), *slots}):
        mine = [row for row in alive if name in row["pools"]]
        changed = known.get(name, {})
        rows.append(
            {
                "name": name,
                "requires": changed.get("requires", {}),
                "waiting": due.get(name, 0),
                "running": busy.get(name, 0),
                "workers": sum(row["host_id"] is None for row in mine),
                "hosts": sum(row["host_id"] is not None for row in mine),
                "slots": slots[name],
                "changed_at": changed.get("changed_at"),
                "changed_by": changed.get("changed_by"),
            }
        )
    return rows
