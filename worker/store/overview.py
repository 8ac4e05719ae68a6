"""Overview: how large and how busy an installation is, in rows that name nobody; for a support bundle."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select, text

from worker.store import tables
from worker.store.connection import is_postgresql

Row = dict[str, Any]

# Unfinished runs that are looked at: no table is counted.
MOST = 10_000
# Rows of what is shown one by one.
NEWEST = 50

# Estimates of the planner; `bytes` with indexes.
_POSTGRESQL_SIZES = """
SELECT c.relname AS table, c.reltuples::bigint AS rows, pg_total_relation_size(c.oid) AS bytes,
       s.n_dead_tup AS dead_rows, s.last_autovacuum AS vacuumed_at
FROM pg_class c LEFT JOIN pg_stat_user_tables s ON s.relid = c.oid
WHERE c.relkind = 'r' AND c.relnamespace = to_regnamespace(current_schema()) ORDER BY 3 DESC
"""


def server(connection: Connection) -> Row:
    """Kind and version of the database."""
    query = "SHOW server_version" if is_postgresql(connection) else "SELECT sqlite_version()"
    return {"dialect": connection.dialect.name, "version": connection.execute(text(query)).scalar_one()}


def sizes(connection: Connection) -> list[Row]:
    """How large the tables are, the largest first; of SQLite only the whole file."""
    if is_postgresql(connection):
        return [dict(row) for row in connection.execute(text(_POSTGRESQL_SIZES)).mappings()]
    pages = {
        name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
        for name in ("page_count", "page_size", "freelist_count")
    }
    size = pages["page_size"]
    return [
        {"table": None, "bytes": pages["page_count"] * size, "free_bytes": pages["freelist_count"] * size}
    ]


def unfinished_for_all_orgs(connection: Connection) -> list[Row]:
    """Runs by state and reason, of the unfinished ones that are looked at."""
    live = tables.live_runs
    some = select(live.c.state, live.c.reason).limit(MOST).subquery()
    query = select(some.c.state, some.c.reason, func.count().label("runs")).group_by(
        some.c.state, some.c.reason
    )
    return [dict(row) for row in connection.execute(query.order_by(some.c.state, some.c.reason)).mappings()]


def ended_for_all_orgs(connection: Connection, now: datetime) -> list[Row]:
    """Runs that ended within a day, by hour and state."""
    hours = tables.rollup_hours
    query = (
        select(hours.c.hour, hours.c.state, func.sum(hours.c.runs).label("runs"))
        .where(hours.c.hour > now - timedelta(days=1))
        .group_by(hours.c.hour, hours.c.state)
        .order_by(hours.c.hour, hours.c.state)
    )
    return [{**row, "runs": int(row["runs"])} for row in connection.execute(query).mappings()]


def workers(connection: Connection) -> list[Row]:
    """The newest workers: their machine, what they can and how they ended."""
    newest = tables.workers
    names = (
        "id",
        "host",
        "version",
        "started_at",
        "renewed_at",
        "lease_until",
        "ended_at",
        "capacity",
        "handlers",
    )
    query = select(*(newest.c[name] for name in names)).order_by(newest.c.id.desc()).limit(NEWEST)
    return [dict(row) for row in connection.execute(query).mappings()]
