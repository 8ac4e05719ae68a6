"""Health: whether rows agree with each other, what keeps old ones from going, and what nobody fires."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, select, text

from worker.ids import RunId
from worker.store import tables
from worker.store.connection import database_now, is_postgresql
from worker.store.engine import libpq_arguments, read_url

# Where servers have their sockets.
SOCKETS = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # noqa: S108 - PostgreSQL's own default
NOWHERE = "/nonexistent"

# Sessions other than this one that vacuum or a lock has to wait for (a replica's feedback is one
# without a transaction of its own), prepared transactions and replication slots.
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

# A run without a live row that has not ended is carried by nobody; a live row without
# an unfinished run would act for one that has ended, or that never was.
STRAYED = """
SELECT l.id, 'a live row whose run has ended or is gone' AS fault
FROM live_runs l LEFT JOIN runs r ON r.id = l.id WHERE r.id IS NULL OR r.state IS NOT NULL
UNION ALL
SELECT r.id, 'an unfinished run without a live row'
FROM runs r LEFT JOIN live_runs l ON l.id = r.id WHERE r.state IS NULL AND l.id IS NULL
LIMIT :most
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """What holds a snapshot: `seconds` for how long where that is known, `transactions` how far back."""

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
    """The ways in which the server of a PostgreSQL URL lets its user in without the password.

    Besides the place of the URL, a server on this machine may be reached by its socket.
    """
    import psycopg
    from psycopg.conninfo import make_conninfo

    arguments = libpq_arguments(read_url(url), role="doctor")
    # Empty or not there: what libpq would take from the environment and from the home does not count.
    nothing = {"password": "", "passfile": NOWHERE, "sslcert": NOWHERE, "connect_timeout": "3"}
    named, port = arguments.get("host", ""), arguments.get("port", "5432")
    sockets = (place for place in SOCKETS if os.path.exists(f"{place}/.s.PGSQL.{port}"))
    ways = []
    for place in dict.fromkeys((named, *sockets)):
        with suppress(psycopg.OperationalError):
            asked = arguments | nothing | ({"host": place} if place else {})
            psycopg.connect(make_conninfo(**asked)).close()
            how = "a Unix socket" if not place or place.startswith("/") else "TCP"
            ways.append(f"{arguments.get('user', 'the user of this process')} over {how}")
    return ways


def snapshot_holders(connection: Connection) -> list[Holder]:
    """What keeps PostgreSQL from removing dead rows, the oldest first; SQLite has no such thing."""
    if not is_postgresql(connection):
        return []
    return [Holder(*row) for row in connection.execute(text(HOLDERS))]


def oldest_unfired(connection: Connection) -> tuple[str, str, float] | None:
    """The instant that has waited longest to be fired: its org, its definition, and for how many seconds."""
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


def strayed(connection: Connection, *, most: int = 20) -> Sequence[tuple[RunId, str]]:
    """Runs whose live row and own row disagree, each with what is wrong; one statement, one snapshot."""
    return [(id_, fault) for id_, fault in connection.execute(text(STRAYED), {"most": most})]
