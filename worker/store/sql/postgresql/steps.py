"""Steps and waits: store the results of a batch of steps, open what a run waits for, wake parked runs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.ids import RunId
from worker.model.runs.run import RunStep
from worker.model.runs.waits import MAX_WAITS, NewWait, WaitState, options_text
from worker.store.dialect import driver
from worker.store.sql.contract import OF_STEP, in_order
from worker.store.sql.postgresql.arrays import Columns, instants, numbers, texts, uuids

# The rows of the runs are locked in the order of ids until the steps are durable: no other worker takes over.
# `state NOT IN` as in `finish`. A step that is stored already is of this attempt: a place is used once.
STORE = f"""
WITH e AS MATERIALIZED (
  SELECT * FROM unnest((SELECT %s::uuid[]), (SELECT %s::uuid[]), (SELECT %s::bigint[]),
                       (SELECT %s::integer[]), (SELECT %s::text[]), (SELECT %s::integer[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::integer[]),
                       (SELECT %s::timestamptz[]), (SELECT %s::timestamptz[]), (SELECT %s::integer[]),
                       (SELECT %s::text[]))
    AS e({OF_STEP})
), ours AS MATERIALIZED (
  SELECT id, fencing_token, recoveries FROM live_runs
  WHERE id = ANY(ARRAY(SELECT run_id FROM e)) AND state NOT IN ('waiting', 'held', 'parked')
  ORDER BY id FOR UPDATE
), moved AS (
  UPDATE live_runs l SET recoveries = 0 FROM ours
  WHERE l.id = ours.id AND ours.recoveries > 0
    AND EXISTS (SELECT 1 FROM e WHERE e.run_id = ours.id AND e.fencing_token = ours.fencing_token)
), stored AS (
  INSERT INTO steps ({OF_STEP})
  SELECT e.run_id, e.org_id, e.fencing_token, e.attempt, e.handler, e.seq, e.name, e.key, e.occurrence,
         e.started_at, e.ended_at, e.size, e.result::json
  FROM e JOIN ours ON ours.id = e.run_id AND ours.fencing_token = e.fencing_token
  ON CONFLICT DO NOTHING
)
SELECT id, fencing_token FROM ours
"""

# Of a `RunStep`.
STEPS = Columns(
    (uuids, "run.id run.org_id"),
    (numbers, "run.fencing_token run.attempt"),
    (texts, "handler"),
    (numbers, "step.seq"),
    (texts, "step.name step.key"),
    (numbers, "step.occurrence"),
    (instants, "step.started_at step.ended_at"),
    (numbers, "size"),
    (texts, "step.result_json"),
)


def store_steps(
    connection: Connection, steps: Sequence[RunStep], *, commit: bool = True
) -> set[tuple[RunId, int]]:
    raw = driver(connection)
    # With COMMIT in the same pipeline: one round trip.
    with raw.pipeline():
        rows = raw.execute(STORE, STEPS.of(in_order(steps)))
        if commit:
            raw.execute("COMMIT", prepare=False)
    return {(RunId(id_), token) for id_, token in rows.fetchall()}


# The options of the first call stay. An answer that came before them may not be one of them.
_OPTIONS = "(CASE WHEN w.opened_at IS NULL THEN excluded.options ELSE w.options END)"
_ANSWERED = f"(w.answered_at IS NOT NULL AND COALESCE({_OPTIONS} @> jsonb_build_array(w.answer), true))"

# Locks the run first, as an answer does. The deadline of the first call stays.
OPEN_WAIT = f"""
WITH ours AS MATERIALIZED (
  SELECT id, org_id FROM live_runs
  WHERE id = %(run)s AND fencing_token = %(token)s AND state NOT IN ('waiting', 'held', 'parked') FOR UPDATE
)
INSERT INTO waits AS w (run_id, name, occurrence, org_id, kind, ask, options, opened_at, until,
                        pending_attempt, timed_out_at)
SELECT o.id, %(name)s, %(occurrence)s, o.org_id, %(kind)s, %(ask)s::jsonb, %(options)s::jsonb, c.now,
       c.now + make_interval(secs => %(seconds)s::float8),
       CASE WHEN %(seconds)s::float8 <= 0 THEN NULL ELSE %(attempt)s::integer END,
       CASE WHEN %(seconds)s::float8 <= 0 THEN c.now END
FROM ours o, (SELECT clock_timestamp() AS now) c
ON CONFLICT (run_id, name, occurrence) DO UPDATE SET
  ask = CASE WHEN w.opened_at IS NULL THEN excluded.ask ELSE w.ask END,
  options = {_OPTIONS},
  refused = CASE WHEN w.answered_at IS NOT NULL AND NOT {_ANSWERED}
    THEN jsonb_build_object('answer', w.answer) ELSE w.refused END,
  answered_at = CASE WHEN {_ANSWERED} THEN w.answered_at END,
  answered_by = CASE WHEN {_ANSWERED} THEN w.answered_by END,
  answer = CASE WHEN {_ANSWERED} THEN w.answer END,
  until = CASE WHEN w.opened_at IS NULL THEN excluded.until ELSE w.until END,
  opened_at = COALESCE(w.opened_at, excluded.opened_at),
  pending_attempt = CASE
    WHEN NOT {_ANSWERED} AND w.timed_out_at IS NULL
         AND (w.opened_at IS NULL OR w.until IS NULL OR w.until > excluded.opened_at)
    THEN excluded.pending_attempt END,
  timed_out_at = CASE WHEN NOT {_ANSWERED}
    THEN COALESCE(w.timed_out_at, CASE WHEN w.until <= excluded.opened_at THEN excluded.opened_at END) END
RETURNING kind, answered_at IS NOT NULL, answer::text, timed_out_at IS NOT NULL, until, xmax = 0
"""

COUNT_WAITS = "SELECT count(*) FROM (SELECT 1 FROM waits WHERE run_id = %s LIMIT %s) AS found"

FORGET_WAIT = "DELETE FROM waits WHERE run_id = %s AND name = %s AND occurrence = %s"

# Skips locked rows: another worker wakes them, or the next call.
WAKE_RUNS = """
UPDATE live_runs w SET state = 'waiting', reason = 'resumed', started_at = NULL
WHERE w.id = ANY(ARRAY(
  SELECT p.id FROM live_runs p
  WHERE p.state = 'parked' AND p.available_at <= (SELECT clock_timestamp())
  ORDER BY p.available_at LIMIT %s FOR UPDATE SKIP LOCKED))
"""


def open_wait(
    connection: Connection, run_id: RunId, fencing_token: int, *, attempt: int, wait: NewWait
) -> WaitState | None:
    raw = driver(connection)
    values = {
        "run": run_id,
        "token": fencing_token,
        "name": wait.name,
        "occurrence": wait.occurrence,
        "kind": wait.kind,
        "ask": wait.ask_json,
        "options": options_text(wait),
        "seconds": wait.seconds,
        "attempt": attempt,
    }
    row = raw.execute(OPEN_WAIT, values).fetchone()
    if row is None:
        return None
    kind, answered, answer, over, until, is_new = row
    if is_new and raw.execute(COUNT_WAITS, (run_id, MAX_WAITS + 1)).fetchone()[0] > MAX_WAITS:
        raw.execute(FORGET_WAIT, (run_id, wait.name, wait.occurrence))
        return WaitState(kind, "too_many")
    return WaitState(kind, "answered" if answered else "over" if over else "pending", answer, until)


def wake_due(connection: Connection, *, limit: int) -> int:
    woken: int = driver(connection).execute(WAKE_RUNS, (limit,)).rowcount
    return woken
