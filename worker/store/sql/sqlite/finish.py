"""Finish: write ended attempts, checkpoints, progress and log lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text, to_text
from worker.ids import DefinitionId, RunId, WorkerId
from worker.model.definitions.budgets import MAX_SUM
from worker.model.runs.egress import EgressRow
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, LogLine
from worker.store.dialect import compact_json, driver, file_now
from worker.store.sql import run_egress, run_words
from worker.store.sql.contract import (
    ADD_TO_DAY,
    ADD_TO_HOUR,
    STOPPED,
    Ending,
    LockedRun,
    OpenWaits,
    Progress,
    Rollups,
    end_runs,
    sum_up,
    wake,
)
from worker.store.sql.sqlite.values import Rows, in_one_step, instant, json_list, json_text
from worker.store.tables import NEVER

# One row for the whole batch: see `values`.
OWNED = f"""
SELECT json_group_array(json_array(l.id, l.fencing_token, l.available_at, l.started_at, l.progress,
                                   {STOPPED})),
       EXISTS (SELECT 1 FROM live_runs WHERE state = 'held')
FROM json_each(?) e CROSS JOIN live_runs l ON l.id = e.value
WHERE l.state = 'running' AND l.worker_id = ?
"""

WRITTEN = """
SELECT 1 FROM attempts
WHERE run_id = ? AND attempt = ? AND worker_id = ? AND fencing_token = ? AND outcome = ?
"""

DELETE = "DELETE FROM live_runs WHERE id IN {rows}"

END = """
UPDATE runs SET finished_at = ?, worker_id = ?, state = column2, reason = column3, detail = column4,
                available_at = column5, started_at = column6, attempt = column7,
                result_fencing_token = column8, progress = column9, result = column10, error = column11
FROM {rows} WHERE runs.id = column1 AND runs.state IS NULL
"""

WAIT = """
UPDATE live_runs SET state = 'waiting', reason = column2, detail = column3, available_at = column4,
                     failures = column5, recoveries = column6,
                     start_by = CASE WHEN column7 THEN start_by END,
                     progress = COALESCE(column8, progress), worker_id = NULL, started_at = NULL
FROM {rows} WHERE live_runs.id = column1
"""

WAITS = """
SELECT w.run_id, max(w.answered_at IS NOT NULL OR w.timed_out_at IS NOT NULL), min(w.until)
FROM json_each(?) e CROSS JOIN waits w
  ON w.run_id = json_extract(e.value, '$[0]') AND w.pending_attempt = json_extract(e.value, '$[1]')
GROUP BY w.run_id
"""

PARK = """
UPDATE live_runs SET state = 'parked', reason = column2, detail = column3, available_at = column4,
                     failures = column5, recoveries = column6,
                     start_by = CASE WHEN column7 THEN start_by END,
                     progress = COALESCE(column8, progress), worker_id = NULL,
                     started_at = CASE WHEN column9 THEN started_at END
FROM {rows} WHERE live_runs.id = column1
"""

ATTEMPTS = """
INSERT INTO attempts (worker_id, run_id, attempt, org_id, fencing_token, handler, token_ready_at,
                      handler_started_at, ended_at, outcome, error, error_cause, claims, flags, jti,
                      claims_hash, peak_memory, started_at)
SELECT ?, * FROM {rows} WHERE column1 IS NOT NULL
"""

DAYS = f"""
INSERT INTO rollup_days (day, org_id, runs, attempts, handler_seconds)
SELECT * FROM {{rows}} WHERE column1 IS NOT NULL {ADD_TO_DAY}
"""

HOURS = f"""
INSERT INTO rollup_hours (hour, org_id, state, runs)
SELECT * FROM {{rows}} WHERE column1 IS NOT NULL {ADD_TO_HOUR}
"""

STATE = """
INSERT INTO definition_states (updated_by, version, updated_at, definition_id, org_id, data, run_id)
SELECT 'worker', 1, ?, * FROM {rows} WHERE column1 IS NOT NULL
ON CONFLICT (definition_id) DO UPDATE SET data = excluded.data, version = version + 1,
   updated_at = excluded.updated_at, updated_by = excluded.updated_by, run_id = excluded.run_id
"""

NAMES = "SELECT id, name FROM definitions WHERE id IN (SELECT value FROM json_each(?))"

WORDS = """
INSERT INTO run_words (word, run_id, org_id, shown)
SELECT * FROM {rows} WHERE column1 IS NOT NULL ON CONFLICT DO NOTHING
"""

SENT_BEFORE = f"""
SELECT run_id, {run_egress.COLUMNS} FROM run_egress
WHERE run_id IN (SELECT value FROM json_each(?)) ORDER BY run_id, origin
"""

SENT = f"""
INSERT OR REPLACE INTO run_egress (run_id, org_id, attempt, {run_egress.COLUMNS})
SELECT * FROM {{rows}} WHERE column1 IS NOT NULL
"""

USED = f"""
INSERT INTO meter_days (day, org_id, definition_id, meter, used)
SELECT ?, column2, column3, column5, min(sum(column6), {MAX_SUM})
FROM {{rows}} WHERE column1 IS NOT NULL GROUP BY column2, column3, column5
ON CONFLICT (day, org_id, meter, definition_id)
DO UPDATE SET used = min(used + excluded.used, {MAX_SUM})
"""

ANY_HELD = "SELECT 1 FROM live_runs WHERE state = 'held' LIMIT 1"

HELD = """
SELECT h.id, h.available_at, h.start_by FROM live_runs h INDEXED BY uq_live_runs_held
WHERE h.state = 'held'
  AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.definition_id = h.definition_id
                  AND l.serial AND l.state IN ('waiting', 'running', 'parked'))
"""

PROMOTE = """
UPDATE live_runs SET state = 'waiting', reason = 'due', available_at = ?, start_by = ? WHERE id = ?
"""


# Of an `Ending`: the columns of `ATTEMPTS` before `started_at`, and those of `STATE`.
ENDED = Rows(
    (None, "attempt.run_id attempt.attempt attempt.org_id attempt.fencing_token attempt.trail.handler"),
    (instant, "attempt.trail.token_ready_at attempt.trail.handler_started_at ended_at"),
    (None, "attempt.outcome"),
    (json_text, "attempt.error"),
    (None, "attempt.error_cause attempt.trail.claims attempt.trail.flags attempt.trail.jti"),
    (None, "attempt.trail.claims_hash attempt.trail.peak_memory"),
)
STATES = Rows((None, "attempt.definition_id attempt.org_id attempt.definition_state attempt.run_id"))
# Of a `StoredEgress`.
TOTALS = Rows(
    (None, "run_id org_id attempt total.origin total.requests total.bytes_out total.bytes_in"),
    (json_text, "total.statuses"),
    (None, "total.denied total.waited_seconds"),
)
LOG_LINES = Rows((None, "run_id attempt seq org_id"), (to_text, "at"), (None, "level source text"))


def finish(connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
    cursor = driver(connection).cursor()
    now = file_now(connection)
    owned, any_held = cursor.execute(
        OWNED, (json_list(attempt.run_id for attempt in ended), worker_id)
    ).fetchone()
    rows = {row[0]: row for row in json.loads(owned)}
    locked = {id_: LockedRun(row[1], bool(row[5]), row[6]) for id_, row in rows.items()}
    endings, fenced = end_runs(ended, locked, now)
    final = [ending for ending in endings if ending.final]
    in_one_step(cursor, DELETE, [(ending.attempt.run_id,) for ending in final])
    in_one_step(
        cursor,
        END,
        [_end_row(ending, rows[ending.attempt.run_id]) for ending in final],
        first=(instant(now), worker_id),
    )
    waiting = [ending for ending in endings if ending.state == "waiting"]
    if parked := [ending for ending in endings if ending.state == "parked"]:
        awake, asleep = wake(parked, _waits_of(cursor, parked), now)
        waiting += awake
        parts = [(*_waiting(each, until or NEVER), each.attempt.counted) for each, until in asleep]
        in_one_step(cursor, PARK, parts)
    later = [(ending, now + (ending.attempt.available_after or timedelta())) for ending in waiting]
    in_one_step(cursor, WAIT, [_waiting(ending, at) for ending, at in later])
    written = [(*ended, rows[ended[0]][3]) for ended in ENDED.of(endings)]
    in_one_step(cursor, ATTEMPTS, written, first=(worker_id,))
    changed = [ending for ending in final if ending.attempt.definition_state is not None]
    changed = [ending for ending in changed if ending.state == "succeeded"]
    in_one_step(cursor, STATE, STATES.of(changed), first=(instant(now),))
    if telling := run_words.telling(ending.attempt for ending in endings):
        names = cursor.execute(NAMES, (json_list(attempt.definition_id for attempt in telling),))
        in_one_step(cursor, WORDS, [word[:4] for word in run_words.words_of(telling, dict(names))])
    if sending := run_egress.sending(ending.attempt for ending in endings):
        totals = run_egress.totals_of(sending, _sent_before(cursor, run_egress.repeated(sending)))
        in_one_step(cursor, SENT, TOTALS.of(totals))
        in_one_step(cursor, USED, run_egress.used_by(sending), first=(now.date().isoformat(),))
    add_rollups(connection, sum_up(endings, now))
    if final and any_held:
        promote(connection, [ending.attempt.definition_id for ending in final])
    return {ending.attempt.run_id for ending in endings} | _written(cursor, worker_id, fenced)


def add_rollups(connection: Connection, rollups: Rollups) -> None:
    cursor = driver(connection).cursor()
    in_one_step(cursor, DAYS, [(day.isoformat(), *sums) for day, *sums in rollups.days])
    in_one_step(cursor, HOURS, [(instant(hour), *sums) for hour, *sums in rollups.hours])


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
        # The start deadline counts from the promotion.
        patience = from_text(start_by) - from_text(available_at) if start_by else None
        rows.append((instant(now), instant(now + patience) if patience is not None else None, id_))
    cursor.executemany(PROMOTE, rows)
    return len(rows)


def _end_row(ending: Ending, row: Sequence[Any]) -> tuple[Any, ...]:
    attempt = ending.attempt
    _, fencing_token, available_at, started_at, progress, _, _ = row
    return (
        attempt.run_id,
        ending.state,
        ending.reason,
        attempt.detail,
        available_at,
        started_at,
        attempt.attempt,
        fencing_token,
        progress if attempt.trail.progress is None else compact_json(attempt.trail.progress),
        attempt.result,
        json_text(attempt.error),
    )


def _waits_of(cursor: Any, parked: Sequence[Ending]) -> dict[RunId, OpenWaits]:
    pairs = json.dumps([(ending.attempt.run_id, ending.attempt.attempt) for ending in parked])
    return {
        id_: OpenWaits(bool(over), None if until is None else from_text(until))
        for id_, over, until in cursor.execute(WAITS, (pairs,))
    }


def _waiting(ending: Ending, available_at: datetime) -> tuple[Any, ...]:
    """The columns of a run that goes on, waiting or parked."""
    attempt = ending.attempt
    counts = attempt.failures, attempt.recoveries, attempt.keep_start_by
    why = attempt.run_id, ending.reason, attempt.detail
    return (*why, to_text(available_at), *counts, json_text(attempt.trail.progress))


def _sent_before(cursor: Any, run_ids: Sequence[RunId]) -> dict[RunId, list[EgressRow]]:
    """What these runs have sent in earlier attempts."""
    if not run_ids:
        return {}
    return run_egress.by_run(cursor.execute(SENT_BEFORE, (json_list(run_ids),)), json.loads)


def _written(cursor: Any, worker_id: WorkerId, fenced: Iterable[EndedAttempt]) -> set[RunId]:
    """The runs that an earlier write of ours ended, whose answer was lost."""
    return {
        attempt.run_id
        for attempt in fenced
        if cursor.execute(
            WRITTEN, (attempt.run_id, attempt.attempt, worker_id, attempt.fencing_token, attempt.outcome)
        ).fetchone()
    }


OURS = "SELECT recoveries FROM live_runs WHERE id = ? AND fencing_token = ? AND state = 'running'"

BEFORE = "SELECT data FROM checkpoints WHERE run_id = ?"

SAVE = """
INSERT INTO checkpoints (run_id, org_id, attempt, fencing_token, number, saved_at, data, handler)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (run_id) DO UPDATE SET attempt = excluded.attempt, fencing_token = excluded.fencing_token,
                                   number = excluded.number, saved_at = excluded.saved_at,
                                   data = excluded.data, handler = COALESCE(handler, excluded.handler)
WHERE fencing_token < excluded.fencing_token OR number <= excluded.number
"""

MOVED = "UPDATE live_runs SET recoveries = 0 WHERE id = ?"

PROGRESS = "UPDATE live_runs SET progress = ? WHERE id = ? AND fencing_token = ? AND state = 'running'"

LINE = """
INSERT INTO run_logs (run_id, attempt, seq, org_id, at, level, source, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING
"""


def save_checkpoint(
    connection: Connection, run: AdmittedRun, handler: str, data_json: str, *, number: int = 0
) -> bool:
    cursor = driver(connection).cursor()
    ours = cursor.execute(OURS, (run.id, run.fencing_token)).fetchone()
    if ours is None:
        return False
    if ours[0] > 0 and cursor.execute(BEFORE, (run.id,)).fetchone() != (data_json,):
        cursor.execute(MOVED, (run.id,))
    key = run.id, run.org_id, run.attempt, run.fencing_token
    cursor.execute(SAVE, (*key, number, to_text(file_now(connection)), data_json, handler))
    return True


def write_progress(connection: Connection, rows: Sequence[Progress]) -> None:
    driver(connection).cursor().executemany(
        PROGRESS, [(json_text(progress), run_id, token) for run_id, token, progress in rows]
    )


def append_logs(connection: Connection, rows: Sequence[LogLine]) -> None:
    driver(connection).cursor().executemany(LINE, LOG_LINES.of(rows))
