"""Renew: extend the lease of an incarnation and return the runs that it owns."""

from __future__ import annotations

import json
from datetime import timedelta

from sqlalchemy import Connection

from worker.ids import WorkerId
from worker.runs.run import OwnedRun
from worker.store.dialect import driver, file_now
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
