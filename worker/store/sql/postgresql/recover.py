"""Recover: find and lock the runs of workers that are gone."""

from __future__ import annotations

from sqlalchemy import Connection

from worker.ids import WorkerId
from worker.store.dialect import driver
from worker.store.sql.contract import AbandonedRun
from worker.store.sql.postgresql.arrays import plain

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
       started_at
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
