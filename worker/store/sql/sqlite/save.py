"""Save: what a run leaves behind while it runs: its checkpoint, its progress, its log."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.clock import to_text
from worker.ids import OrgId, RunId
from worker.runs.run import LogLine
from worker.store.connection import driver, file_now
from worker.store.sql import Progress
from worker.store.sql.sqlite.values import json_text

OURS = "SELECT recoveries FROM live_runs WHERE id = ? AND fencing_token = ? AND state = 'running'"

BEFORE = "SELECT data FROM checkpoints WHERE run_id = ?"

SAVE = """
INSERT INTO checkpoints (run_id, org_id, attempt, fencing_token, saved_at, data) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (run_id) DO UPDATE SET attempt = excluded.attempt, fencing_token = excluded.fencing_token,
                                   saved_at = excluded.saved_at, data = excluded.data
"""

MOVED = "UPDATE live_runs SET recoveries = 0 WHERE id = ?"

PROGRESS = "UPDATE live_runs SET progress = ? WHERE id = ? AND fencing_token = ? AND state = 'running'"

LINE = """
INSERT INTO run_logs (run_id, attempt, seq, org_id, at, level, source, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
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
    cursor = driver(connection).cursor()
    ours = cursor.execute(OURS, (run_id, fencing_token)).fetchone()
    if ours is None:
        return False
    if ours[0] > 0 and cursor.execute(BEFORE, (run_id,)).fetchone() != (data_json,):
        cursor.execute(MOVED, (run_id,))
    now = to_text(file_now(connection))
    cursor.execute(SAVE, (run_id, org_id, attempt, fencing_token, now, data_json))
    return True


def write_progress(connection: Connection, rows: Sequence[Progress]) -> None:
    driver(connection).cursor().executemany(
        PROGRESS, [(json_text(progress), run_id, token) for run_id, token, progress in rows]
    )


def append_logs(connection: Connection, rows: Sequence[LogLine]) -> None:
    driver(connection).cursor().executemany(
        LINE,
        [
            (
                line.run_id,
                line.attempt,
                line.seq,
                line.org_id,
                to_text(line.at),
                line.level,
                line.source,
                line.text,
            )
            for line in rows
        ],
    )
