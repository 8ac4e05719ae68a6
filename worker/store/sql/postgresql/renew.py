"""Renew: extend the lease of an incarnation and return the runs that it owns."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection

from worker.ids import WorkerId
from worker.runs.run import OwnedRun
from worker.store.dialect import driver

EXTEND = """
WITH me AS (
  UPDATE workers SET renewed_at = c.now, lease_until = c.now + make_interval(secs => %s)
  FROM (SELECT clock_timestamp() AS now) c
  WHERE id = %s AND ended_at IS NULL RETURNING id)
"""
OWNED = """l.id, l.fencing_token,
       COALESCE(l.cancel_reason, CASE WHEN o.state IN ('suspended', 'removed') THEN 'suspended' END)"""
OF_ME = "FROM me LEFT JOIN (live_runs l JOIN orgs o ON o.id = l.org_id) ON l.worker_id = me.id"

RENEW = f"{EXTEND} SELECT {OWNED} {OF_ME}"

AS_JSON = f"""
{EXTEND}
SELECT count(me.id),
       COALESCE(json_agg(json_build_array({OWNED})) FILTER (WHERE l.id IS NOT NULL), '[]')::text
{OF_ME}
"""


def renew(connection: Connection, worker_id: WorkerId, lease: timedelta) -> tuple[bool, list[OwnedRun]]:
    rows = driver(connection).execute(RENEW, (lease.total_seconds(), worker_id)).fetchall()
    return bool(rows), [OwnedRun(*row) for row in rows if row[0] is not None]


def renew_as_json(connection: Connection, worker_id: WorkerId, lease: timedelta) -> tuple[bool, str]:
    count, owned = driver(connection).execute(AS_JSON, (lease.total_seconds(), worker_id)).fetchone()
    return count > 0, owned
