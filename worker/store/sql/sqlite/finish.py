"""Finish: attempts that ended are written, and their runs end or wait again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text
from worker.ids import DefinitionId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt
from worker.store.connection import driver, file_now
from worker.store.engine import shared_json
from worker.store.sql.ending import Ending, Held, Rollups, settle, sum_up
from worker.store.sql.sqlite.values import instant, json_list, json_text

OWNED = """
SELECT l.id, l.fencing_token, l.available_at, l.started_at, l.progress, l.cancel_requested_at IS NOT NULL,
       l.cancel_reason
FROM json_each(?) e CROSS JOIN live_runs l ON l.id = e.value
WHERE l.state = 'running' AND l.worker_id = ?
"""

WRITTEN = """
SELECT 1 FROM attempts
WHERE run_id = ? AND attempt = ? AND worker_id = ? AND fencing_token = ? AND outcome = ?
"""

DELETE = "DELETE FROM live_runs WHERE id = ?"

END = """
UPDATE runs SET state = ?, reason = ?, detail = ?, available_at = ?, started_at = ?, finished_at = ?,
                attempt = ?, result_fencing_token = ?, worker_id = ?, progress = ?, result = ?, error = ?
WHERE id = ? AND state IS NULL
"""

WAIT = """
UPDATE live_runs SET state = 'waiting', reason = ?, detail = ?, available_at = ?, failures = ?,
                     recoveries = ?, start_by = CASE WHEN ? THEN start_by END,
                     progress = COALESCE(?, progress), worker_id = NULL, started_at = NULL
WHERE id = ?
"""

ATTEMPT = """
INSERT INTO attempts (run_id, attempt, org_id, worker_id, fencing_token, handler, started_at,
                      token_ready_at, handler_started_at, ended_at, outcome, error, error_cause, claims,
                      flags, jti, claims_hash, peak_memory)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

DAY = """
INSERT INTO rollup_days (day, org_id, runs, attempts, handler_seconds) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (day, org_id) DO UPDATE SET runs = runs + excluded.runs,
   attempts = attempts + excluded.attempts, handler_seconds = handler_seconds + excluded.handler_seconds
"""

HOUR = """
INSERT INTO rollup_hours (hour, org_id, state, runs) VALUES (?, ?, ?, ?)
ON CONFLICT (hour, org_id, state) DO UPDATE SET runs = runs + excluded.runs
"""

ANY_HELD = "SELECT 1 FROM live_runs WHERE state = 'held' LIMIT 1"

HELD = """
SELECT h.id, h.available_at, h.start_by FROM live_runs h INDEXED BY uq_live_runs_held
WHERE h.state = 'held'
  AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.definition_id = h.definition_id
                  AND l.serial AND l.state IN ('waiting', 'running'))
"""

PROMOTE = """
UPDATE live_runs SET state = 'waiting', reason = 'due', available_at = ?, start_by = ? WHERE id = ?
"""


def finish(connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
    cursor = driver(connection).cursor()
    now = file_now(connection)
    rows = {
        row[0]: row
        for row in cursor.execute(OWNED, (json_list(attempt.run_id for attempt in ended), worker_id))
    }
    held = {id_: Held(row[1], bool(row[5]), row[6]) for id_, row in rows.items()}
    endings, fenced = settle(ended, held, now)
    final = [ending for ending in endings if ending.final]
    cursor.executemany(DELETE, [(ending.attempt.run_id,) for ending in final])
    cursor.executemany(
        END, [_end_row(ending, rows[ending.attempt.run_id], worker_id, now) for ending in final]
    )
    cursor.executemany(WAIT, [_wait_row(ending, now) for ending in endings if not ending.final])
    cursor.executemany(ATTEMPT, [_attempt_row(ending, worker_id) for ending in endings])
    add_rollups(connection, sum_up(endings, now))
    if final:
        promote(connection, [ending.attempt.definition_id for ending in final])
    return {ending.attempt.run_id for ending in endings} | _written(cursor, worker_id, fenced)


def add_rollups(connection: Connection, rollups: Rollups) -> None:
    cursor = driver(connection).cursor()
    cursor.executemany(DAY, [(day.isoformat(), *sums) for day, *sums in rollups.days])
    cursor.executemany(HOUR, [(instant(hour), *sums) for hour, *sums in rollups.hours])


def promote(connection: Connection, definitions: Sequence[DefinitionId] | None) -> int:
    cursor = driver(connection).cursor()
    if cursor.execute(ANY_HELD).fetchone() is None:
        return 0
    statement, values = HELD, []
    if definitions is not None:
        statement += " AND h.definition_id IN (SELECT value FROM json_each(?))"
        values.append(json_list(definitions))
    now = file_now(connection)
    rows = []
    for id_, available_at, start_by in cursor.execute(statement, values).fetchall():
        # Its start deadline counts from its promotion.
        patience = from_text(start_by) - from_text(available_at) if start_by else None
        rows.append((instant(now), instant(now + patience) if patience is not None else None, id_))
    cursor.executemany(PROMOTE, rows)
    return len(rows)


def _end_row(ending: Ending, row: tuple[Any, ...], worker_id: WorkerId, now: datetime) -> tuple[Any, ...]:
    attempt = ending.attempt
    _, fencing_token, available_at, started_at, progress, _, _ = row
    return (
        ending.state,
        ending.reason,
        attempt.detail,
        available_at,
        started_at,
        instant(now),
        attempt.attempt,
        fencing_token,
        worker_id,
        json_text(attempt.trail.progress) or progress,
        attempt.result,
        json_text(attempt.error),
        attempt.run_id,
    )


def _wait_row(ending: Ending, now: datetime) -> tuple[Any, ...]:
    attempt = ending.attempt
    return (
        ending.reason,
        attempt.detail,
        instant(now + (attempt.available_after or timedelta())),
        attempt.failures,
        attempt.recoveries,
        attempt.keep_start_by,
        json_text(attempt.trail.progress),
        attempt.run_id,
    )


def _attempt_row(ending: Ending, worker_id: WorkerId) -> tuple[Any, ...]:
    attempt, trail = ending.attempt, ending.attempt.trail
    return (
        attempt.run_id,
        attempt.attempt,
        attempt.org_id,
        worker_id,
        attempt.fencing_token,
        trail.handler,
        instant(attempt.started_at),
        instant(trail.token_ready_at),
        instant(trail.handler_started_at),
        instant(ending.ended_at),
        attempt.outcome,
        json_text(attempt.error),
        attempt.error_cause,
        None if trail.claims is None else shared_json(trail.claims),
        None if trail.flags is None else shared_json(trail.flags),
        trail.jti,
        trail.claims_hash,
        trail.peak_memory,
    )


def _written(cursor: Any, worker_id: WorkerId, fenced: Iterable[EndedAttempt]) -> set[RunId]:
    """Those of them that an earlier write of ours, whose answer was lost, has ended already."""
    return {
        attempt.run_id
        for attempt in fenced
        if cursor.execute(
            WRITTEN,
            (attempt.run_id, attempt.attempt, worker_id, attempt.fencing_token, attempt.outcome),
        ).fetchone()
    }
