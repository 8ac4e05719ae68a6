"""Leases: extend one and return its runs; find and lock the runs of workers that are gone."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection

from worker.ids import WorkerId
from worker.model.runs.run import OwnedRun
from worker.store.dialect import driver
from worker.store.sql.contract import AbandonedRun
from worker.store.sql.postgresql.arrays import plain

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


# A simultaneous renewal waits for this lock, or holds it and is skipped.
END = """
WITH gone AS (
  SELECT id FROM workers
  WHERE ended_at IS NULL AND id IS DISTINCT FROM %s::uuid
    AND (%s::uuid IS NOT NULL OR lease_until < (SELECT clock_timestamp()))
  ORDER BY id FOR UPDATE SKIP LOCKED)
UPDATE workers SET ended_at = clock_timestamp(), outcome = 'crashed', recovered_by = %s::uuid
WHERE id = ANY(ARRAY(SELECT id FROM gone))
"""

OWNERS = """
WITH RECURSIVE owner(id) AS (
  (SELECT worker_id FROM live_runs WHERE worker_id IS NOT NULL ORDER BY worker_id LIMIT 1)
  UNION ALL
  SELECT (SELECT l.worker_id FROM live_runs l WHERE l.worker_id > owner.id
          ORDER BY l.worker_id LIMIT 1)
  FROM owner WHERE owner.id IS NOT NULL
)
SELECT o.id FROM owner o LEFT JOIN workers w ON w.id = o.id
WHERE o.id IS NOT NULL AND (w.id IS NULL OR w.ended_at IS NOT NULL) AND o.id IS DISTINCT FROM %s::uuid
"""

ABANDONED = """
SELECT id, org_id, definition_id, revision, handler, worker_id, fencing_token, attempt, failures, recoveries,
       parent_id, started_at
FROM live_runs
WHERE worker_id = ANY(%s::uuid[])
ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED
"""


def recover_lock(
    connection: Connection, *, by: WorkerId | None, others_than: WorkerId | None, limit: int
) -> list[AbandonedRun]:
    raw = driver(connection)
    with raw.pipeline():
        raw.execute(END, (others_than, others_than, by))
        owners = [id_ for (id_,) in raw.execute(OWNERS, (others_than,))]
    if not owners:
        return []
    return [AbandonedRun(*row) for row in raw.execute(ABANDONED, (plain(owners), limit))]
