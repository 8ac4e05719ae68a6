"""Save: what a run leaves behind while it runs: its checkpoint, its progress, its log."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.ids import OrgId, RunId
from worker.runs.run import LogLine
from worker.store.connection import driver
from worker.store.sql import Progress
from worker.store.sql.postgresql.arrays import instants, jsons, plain, texts

# `state NOT IN` is running by words that fit no partial index: the primary key is meant.
# The row stays locked until the checkpoint is durable: nobody takes the run over in between.
SAVE = """
WITH ours AS (
  SELECT id, recoveries FROM live_runs
  WHERE id = %(run)s AND fencing_token = %(token)s AND state NOT IN ('waiting', 'held') FOR UPDATE
), moved AS (
  UPDATE live_runs l SET recoveries = 0 FROM ours
  WHERE l.id = ours.id AND ours.recoveries > 0
    AND (SELECT data FROM checkpoints WHERE run_id = %(run)s) IS DISTINCT FROM %(data)s::jsonb
)
INSERT INTO checkpoints (run_id, org_id, attempt, fencing_token, saved_at, data)
SELECT id, %(org)s, %(attempt)s, %(token)s, clock_timestamp(), %(data)s::jsonb FROM ours
ON CONFLICT (run_id) DO UPDATE SET attempt = excluded.attempt, fencing_token = excluded.fencing_token,
                                   saved_at = excluded.saved_at, data = excluded.data
RETURNING 1
"""

LOCK = "SELECT 1 FROM live_runs WHERE id = ANY(%s::uuid[]) ORDER BY id FOR UPDATE"

PROGRESS = """
UPDATE live_runs l SET progress = p.progress::jsonb
FROM unnest(%s::uuid[], %s::bigint[], %s::text[]) AS p(id, fencing_token, progress)
WHERE l.id = p.id AND l.fencing_token = p.fencing_token AND l.state NOT IN ('waiting', 'held')
"""

LINES = """
INSERT INTO run_logs (run_id, attempt, seq, org_id, at, level, source, text)
SELECT * FROM unnest(%s::uuid[], %s::integer[], %s::integer[], %s::uuid[], %s::timestamptz[], %s::text[],
                     %s::text[], %s::text[])
ON CONFLICT DO NOTHING
"""


def save_checkpoint(
    connection: Connection,
    run_id: RunId,
    fencing_token: int,
    *,
    attempt: int,
    org_id: OrgId,
    data_json: str,
) -> bool:
    values = {
        "run": run_id,
        "token": fencing_token,
        "org": org_id,
        "attempt": attempt,
        "data": data_json,
    }
    return driver(connection).execute(SAVE, values).fetchone() is not None


def write_progress(connection: Connection, rows: Sequence[Progress]) -> None:
    raw = driver(connection)
    ids = plain(run_id for run_id, _, _ in rows)
    with raw.pipeline():
        raw.execute(LOCK, (ids,))
        raw.execute(
            PROGRESS, (ids, plain(token for _, token, _ in rows), jsons(progress for _, _, progress in rows))
        )


def append_logs(connection: Connection, rows: Sequence[LogLine]) -> None:
    driver(connection).execute(
        LINES,
        (
            plain(line.run_id for line in rows),
            plain(line.attempt for line in rows),
            plain(line.seq for line in rows),
            plain(line.org_id for line in rows),
            instants(line.at for line in rows),
            texts(line.level for line in rows),
            texts(line.source for line in rows),
            texts(line.text for line in rows),
        ),
    )
