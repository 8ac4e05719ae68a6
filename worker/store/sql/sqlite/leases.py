"""Leases: extend one and return its runs; find and lock the runs of workers that are gone.

On SQLite the lock beside the file decides, not a lease: its holder is the only worker. Hosts have leases.
"""

from __future__ import annotations

import json
from datetime import timedelta

from sqlalchemy import Connection

from worker.clock import from_text
from worker.ids import WorkerId
from worker.model.runs.run import OwnedRun
from worker.store.dialect import driver, file_now
from worker.store.sql.contract import AbandonedRun
from worker.store.sql.sqlite.values import instant

RENEW = "UPDATE workers SET renewed_at = ?, lease_until = ? WHERE id = ? AND ended_at IS NULL"

OWNED = """
SELECT l.id, l.fencing_token,
       COALESCE(l.cancel_reason, CASE WHEN o.state IN ('suspended', 'removed') THEN 'suspended' END)
FROM live_runs l CROSS JOIN orgs o ON o.id = l.org_id
WHERE l.state = 'running' AND l.worker_id = ?
"""


def renew(connection: Connection, worker_id: WorkerId, lease: timedelta) -> tuple[bool, list[OwnedRun]]:
    cursor = driver(connection).cursor()
    now = file_now(connection)
    if cursor.execute(RENEW, (instant(now), instant(now + lease), worker_id)).rowcount == 0:
        return False, []
    return True, [OwnedRun(*row) for row in cursor.execute(OWNED, (worker_id,))]


def renew_as_json(connection: Connection, worker_id: WorkerId, lease: timedelta) -> tuple[bool, str]:
    registered, owned = renew(connection, worker_id, lease)
    return registered, json.dumps([(run.id, run.fencing_token, run.cancel_reason) for run in owned])


END = "UPDATE workers SET ended_at = ?, outcome = 'crashed', recovered_by = ? WHERE ended_at IS NULL"
END_OTHERS = f"{END} AND id <> ? AND host_id IS NULL"
END_HOSTS = f"{END} AND lease_until < ? AND host_id IS NOT NULL"

ABANDONED = """
SELECT l.id, l.org_id, l.definition_id, l.revision, l.handler, l.worker_id, l.fencing_token, l.attempt,
       l.failures, l.recoveries, l.parent_id, l.started_at
FROM live_runs l INDEXED BY ix_live_runs_running_org_id
LEFT JOIN workers w ON w.id = l.worker_id
WHERE l.state = 'running' AND (w.id IS NULL OR w.ended_at IS NOT NULL) AND l.worker_id <> ?
LIMIT ?
"""


def recover_lock(
    connection: Connection, *, by: WorkerId | None, others_than: WorkerId | None, limit: int
) -> list[AbandonedRun]:
    cursor = driver(connection).cursor()
    now = instant(file_now(connection))
    if others_than is not None:
        cursor.execute(END_OTHERS, (now, by, others_than))
    else:
        cursor.execute(END_HOSTS, (now, by, now))
    rows = cursor.execute(ABANDONED, (others_than or "", limit)).fetchall()
    return [AbandonedRun(*(*row[:-1], from_text(row[-1]))) for row in rows]
