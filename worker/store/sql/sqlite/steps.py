"""Steps and waits: store the results of a batch of steps, open what a run waits for, wake parked runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Connection

from worker.clock import from_text, to_text
from worker.ids import RunId
from worker.model.runs.run import RunStep
from worker.model.runs.waits import MAX_WAITS, NewWait, WaitState, is_option, options_text
from worker.store.dialect import driver, file_now
from worker.store.sql.contract import OF_STEP, in_order
from worker.store.sql.sqlite.values import Rows, in_one_answer, in_one_step, instant, json_list

# One row for the whole batch: see `values`.
OURS = """
SELECT json_group_array(json_array(l.id, l.fencing_token, l.recoveries))
FROM json_each(?) e CROSS JOIN live_runs l ON l.id = e.value
WHERE l.state = 'running'
"""

MOVED = "UPDATE live_runs SET recoveries = 0 WHERE id IN {rows}"

# A step that is stored already was stored by this attempt: places are not used twice.
STORE = f"INSERT OR IGNORE INTO steps ({OF_STEP}) SELECT * FROM {{rows}} WHERE column1 IS NOT NULL"


# Of a `RunStep`.
STEPS = Rows(
    (None, "run.id run.org_id run.fencing_token run.attempt handler"),
    (None, "step.seq step.name step.key step.occurrence"),
    (to_text, "step.started_at step.ended_at"),
    (None, "size step.result_json"),
)


def store_steps(
    connection: Connection, steps: Sequence[RunStep], *, commit: bool = True
) -> set[tuple[RunId, int]]:
    cursor = driver(connection).cursor()
    rows = in_one_answer(cursor, OURS, (json_list({step.run.id for step in steps}),))
    locked = {(RunId(id_), token): recoveries for id_, token, recoveries in rows}
    mine = [step for step in in_order(steps) if (step.run.id, step.run.fencing_token) in locked]
    moved = {step.run.id for step in mine if locked[step.run.id, step.run.fencing_token] > 0}
    in_one_step(cursor, MOVED, [(id_,) for id_ in sorted(moved)])
    in_one_step(cursor, STORE, STEPS.of(mine))
    return set(locked)


RUNNING = "SELECT org_id FROM live_runs WHERE id = ? AND fencing_token = ? AND state = 'running'"

FIND_WAIT = """
SELECT kind, opened_at, until, answered_at, CAST(answer AS TEXT), timed_out_at, options FROM waits
WHERE run_id = ? AND name = ? AND occurrence = ?
"""

COUNT_WAITS = "SELECT count(*) FROM (SELECT 1 FROM waits WHERE run_id = ? LIMIT ?)"

NEW_WAIT = """
INSERT INTO waits (run_id, name, occurrence, org_id, kind, ask, options, opened_at, until, pending_attempt,
                   timed_out_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

OPEN_AGAIN = """
UPDATE waits SET ask = CASE WHEN opened_at IS NULL THEN ? ELSE ask END, options = ?, until = ?,
                 opened_at = COALESCE(opened_at, ?), pending_attempt = ?, timed_out_at = ?
WHERE run_id = ? AND name = ? AND occurrence = ?
"""

# An answer that came before the options, and is not one of them.
REFUSE_ANSWER = """
UPDATE waits SET refused = json_object('answer', json(COALESCE(answer, 'null'))),
                 answered_at = NULL, answered_by = NULL, answer = NULL
WHERE run_id = ? AND name = ? AND occurrence = ?
"""

WAKE_RUNS = """
UPDATE live_runs SET state = 'waiting', reason = 'resumed', started_at = NULL
WHERE id IN (SELECT id FROM live_runs INDEXED BY ix_live_runs_parked_available_at
             WHERE state = 'parked' AND available_at <= ? ORDER BY available_at LIMIT ?)
"""


def open_wait(
    connection: Connection, run_id: RunId, fencing_token: int, *, attempt: int, wait: NewWait
) -> WaitState | None:
    cursor = driver(connection).cursor()
    ours = cursor.execute(RUNNING, (run_id, fencing_token)).fetchone()
    if ours is None:
        return None
    now = file_now(connection)
    until = None if wait.seconds is None else now + timedelta(seconds=wait.seconds)
    key = run_id, wait.name, wait.occurrence
    row = cursor.execute(FIND_WAIT, key).fetchone()
    if row is None:
        if cursor.execute(COUNT_WAITS, (run_id, MAX_WAITS)).fetchone()[0] >= MAX_WAITS:
            return WaitState(wait.kind, "too_many")
        over_at = now if until is not None and until <= now else None
        pending = attempt if over_at is None else None
        times = instant(now), instant(until), pending, instant(over_at)
        cursor.execute(NEW_WAIT, (*key, ours[0], wait.kind, wait.ask_json, options_text(wait), *times))
        return WaitState(wait.kind, "pending" if over_at is None else "over", None, until)
    kind, opened, ends, answered, answer, over, options = row
    if opened is None:
        options = options_text(wait)
    else:
        until = None if ends is None else from_text(ends)
    said = None if answered is None else json.loads(answer or "null")
    if answered is not None and options is not None and not is_option(json.loads(options), said):
        cursor.execute(REFUSE_ANSWER, key)
        answered = answer = None
    if answered is None and over is None and until is not None and until <= now:
        over = instant(now)
    pending = attempt if answered is None and over is None else None
    cursor.execute(OPEN_AGAIN, (wait.ask_json, options, instant(until), instant(now), pending, over, *key))
    return WaitState(kind, "answered" if answered else "over" if over else "pending", answer, until)


def wake_due(connection: Connection, *, limit: int) -> int:
    cursor = driver(connection).cursor()
    woken: int = cursor.execute(WAKE_RUNS, (instant(file_now(connection)), limit)).rowcount
    return woken
