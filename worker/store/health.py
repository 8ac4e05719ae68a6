"""Health: inconsistent rows, what keeps dead rows, and an anonymous overview for support."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, and_, func, select, text

from worker.ids import RunId, Scope
from worker.store import tables
from worker.store.dialect import Row, all_rows, database_now, in_scope, is_postgresql
from worker.store.engine import libpq_arguments, read_url

# Folders of servers' sockets.
SOCKETS = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # noqa: S108 - PostgreSQL's own default
NOWHERE = "/nonexistent"

_workers = tables.workers
# What `worker_ends` reads of a worker or an incarnation of a host, and the name of that host.
ENDS = tuple(
    _workers.c[name]
    for name in ("host_id", "renewed_at", "ended_at", "outcome", "recovered_runs", "recovered_by")
)
OF_HOST = (
    select(tables.hosts.c.name)
    .where(tables.hosts.c.id == _workers.c.host_id)
    .scalar_subquery()
    .label("of_host")
)


def holds_lease(at: datetime) -> ColumnElement[bool]:
    """A condition on `workers`: the worker or incarnation of a host has its lease at this time."""
    return and_(_workers.c.ended_at.is_(None), _workers.c.lease_until > at)


# Other sessions that vacuum or a lock waits for (a replica's feedback has no transaction of its own),
# prepared transactions and replication slots.
HOLDERS = """
SELECT 'session' AS kind, 'pid ' || pid AS name, COALESCE(application_name, '') AS application,
       COALESCE(state, backend_type) AS state,
       EXTRACT(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds,
       COALESCE(GREATEST(age(backend_xmin), age(backend_xid)), 0) AS transactions
FROM pg_stat_activity
WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL OR state LIKE 'idle in transaction%')
  AND pid <> pg_backend_pid() AND backend_type <> 'autovacuum worker'
  AND (datname = current_database() OR datname IS NULL)
UNION ALL
SELECT 'prepared', gid, owner::text, 'prepared', EXTRACT(epoch FROM clock_timestamp() - prepared)::float8,
       age(transaction)
FROM pg_prepared_xacts WHERE database = current_database()
UNION ALL
SELECT 'slot', slot_name, COALESCE(plugin, 'physical'), CASE WHEN active THEN 'active' ELSE 'inactive' END,
       NULL, GREATEST(age(xmin), age(catalog_xmin))
FROM pg_replication_slots WHERE xmin IS NOT NULL
ORDER BY transactions DESC, seconds DESC NULLS LAST
"""

# No worker runs an unfinished run without a live row; a live row without an unfinished run acts for a
# run that has ended or does not exist.
STRAYED = """
SELECT l.id, 'a live row whose run has ended or is gone' AS fault
FROM live_runs l LEFT JOIN runs r ON r.id = l.id WHERE r.id IS NULL OR r.state IS NOT NULL
UNION ALL
SELECT r.id, 'an unfinished run without a live row'
FROM runs r LEFT JOIN live_runs l ON l.id = r.id WHERE r.state IS NULL AND l.id IS NULL
LIMIT 20
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """A holder of a snapshot, `transactions` old, for `seconds` if known."""

    kind: str
    name: str
    application: str
    state: str
    seconds: float | None
    transactions: int


def sqlite_file(connection: Connection) -> Path:
    """The file of a SQLite database."""
    return Path(connection.exec_driver_sql("PRAGMA database_list").all()[0][2])


def users_without_password(url: str) -> list[str]:
    """How the server of a PostgreSQL URL accepts its user without the password.

    Tries the URL's host and the sockets of servers on this machine.
    """
    import psycopg
    from psycopg.conninfo import make_conninfo

    arguments = libpq_arguments(read_url(url), role="doctor")
    # Empty or missing, so that libpq takes nothing from the environment or the home folder.
    nothing = {"password": "", "passfile": NOWHERE, "sslcert": NOWHERE, "connect_timeout": "3"}
    named, port = arguments.get("host", ""), arguments.get("port", "5432")
    sockets = (place for place in SOCKETS if os.path.exists(f"{place}/.s.PGSQL.{port}"))
    ways = []
    for place in dict.fromkeys((named, *sockets)):
        with suppress(psycopg.OperationalError):
            tried = arguments | nothing | ({"host": place} if place else {})
            psycopg.connect(make_conninfo(**tried)).close()
            how = "a Unix socket" if not place or place.startswith("/") else "TCP"
            ways.append(f"{arguments.get('user', 'the user of this process')} over {how}")
    return ways


def snapshot_holders(connection: Connection) -> list[Holder]:
    """What keeps PostgreSQL from removing dead rows, oldest first; empty on SQLite."""
    if not is_postgresql(connection):
        return []
    return [Holder(*row) for row in connection.execute(text(HOLDERS))]


def oldest_unfired(connection: Connection) -> tuple[str, str, float] | None:
    """The longest overdue scheduled time: org, definition, and seconds overdue; None if nothing is due."""
    schedule, definitions, orgs = tables.schedule, tables.definitions, tables.orgs
    now = database_now(connection)
    query = (
        select(orgs.c.code, definitions.c.name, schedule.c.next_fire_at)
        .join(definitions, definitions.c.id == schedule.c.definition_id)
        .join(orgs, orgs.c.id == definitions.c.org_id)
        .where(schedule.c.next_fire_at <= now)
        .order_by(schedule.c.next_fire_at)
        .limit(1)
    )
    row = connection.execute(query).first()
    return None if row is None else (row[0], row[1], (now - row[2]).total_seconds())


def strayed(connection: Connection) -> Sequence[tuple[RunId, str]]:
    """Runs whose live row and own row disagree, each with the fault; one statement, one snapshot."""
    return [(id_, fault) for id_, fault in connection.execute(text(STRAYED))]


# Unfinished runs that are counted; tables are never counted whole.
MAX_COUNTED = 10_000
# Rows that are listed.
NEWEST = 50
# Workers and hosts that hold their lease: more than any installation has.
SERVING = 10_000

# Rows are the planner's estimates; bytes include indexes.
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
    """The sizes of the tables, largest first; on SQLite only the size of the file."""
    if is_postgresql(connection):
        return all_rows(connection, text(_POSTGRESQL_SIZES))
    pages = {
        name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
        for name in ("page_count", "page_size", "freelist_count")
    }
    size = pages["page_size"]
    return [
        {"table": None, "bytes": pages["page_count"] * size, "free_bytes": pages["freelist_count"] * size}
    ]


def unfinished(connection: Connection, scope: Scope) -> list[Row]:
    """Unfinished runs by state and reason, up to `MAX_COUNTED`."""
    live = tables.live_runs
    mine = in_scope(live.c.org_id, scope)
    some = select(live.c.state, live.c.reason).where(*mine).limit(MAX_COUNTED).subquery()
    query = select(some.c.state, some.c.reason, func.count().label("runs")).group_by(
        some.c.state, some.c.reason
    )
    return all_rows(connection, query.order_by(some.c.state, some.c.reason))


def workers(connection: Connection) -> list[Row]:
    """The newest workers and incarnations of hosts, with machine, capacity and end; `of_host`: its name."""
    names = "id host version started_at lease_until capacity pools handlers"
    query = select(*(_workers.c[name] for name in names.split()), *ENDS, OF_HOST)
    return all_rows(connection, query.order_by(_workers.c.id.desc()).limit(NEWEST))


def lost_workers(connection: Connection) -> list[Row]:
    """The newest workers and hosts whose lease has expired and that neither stopped nor were taken over."""
    lost = (_workers.c.ended_at.is_(None), _workers.c.lease_until <= database_now(connection))
    columns = (_workers.c[name] for name in ("id", "host", "pid", "renewed_at", "lease_until"))
    query = select(*columns, OF_HOST).where(*lost)
    return all_rows(connection, query.order_by(_workers.c.id.desc()).limit(NEWEST))


def dead_credentials(connection: Connection) -> list[Row]:
    """Active orgs whose issuer rejected each of their active credentials, with its answer, by code."""
    orgs, of_org = tables.orgs, tables.credentials
    good = of_org.alias()
    works = select(good.c.id).where(
        good.c.org_id == of_org.c.org_id, good.c.state == "active", good.c.last_error.is_(None)
    )
    query = (
        select(orgs.c.code, func.max(of_org.c.last_error).label("last_error"))
        .join(orgs, orgs.c.id == of_org.c.org_id)
        .where(
            of_org.c.state == "active",
            of_org.c.last_error.is_not(None),
            orgs.c.state == "active",
            ~works.exists(),
        )
        .group_by(orgs.c.code)
    )
    return all_rows(connection, query.order_by(orgs.c.code).limit(NEWEST))


def live_workers(connection: Connection) -> list[Row]:
    """Machine, capacity, pools and lease of the workers and hosts that hold their lease; of a host its id."""
    names = ("id", "host", "host_id", "capacity", "pools", "renewed_at", "lease_until")
    query = select(*(_workers.c[name] for name in names)).where(holds_lease(database_now(connection)))
    return all_rows(connection, query.order_by(_workers.c.id).limit(SERVING))
