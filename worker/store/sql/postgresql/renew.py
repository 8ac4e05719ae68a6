"""Renew: extend the lease of an incarnation and return the runs that it owns."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection

from worker.ids import WorkerId
from worker.runs.run import OwnedRun
from worker.store.dialect import driver

RENEW = """
WITH me AS (
  UPDATE workers SET renewed_at = c.now, lease_until = c.now + make_interval(secs => %s)
  FROM (SELECT clock_timestamp() AS now) c
  WHERE id = %s AND ended_at IS NULL RETURNING id)
SELECT l.id, l.fencing_token,
       COALESCE(l.cancel_reason, CASE WHEN o.state IN ('suspended', 'removed') THEN 'suspended' END)
FROM me
LEFT JOIN (live_runs l JOIN orgs o ON o.id = l.org_id) ON l.worker_id = me.id
"""


def renew(connection: Connection, worker_id: WorkerId, lease: timedelta) -> tuple[bool, list[OwnedRun]]:
    rows = driver(connection).execute(RENEW, (lease.total_seconds(), worker_id)).fetchall()
    return bool(rows), [OwnedRun(*row) for row in rows if row[0] is not None]
