"""Steps: store the results of a batch of steps, each fenced."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from worker.ids import RunId
from worker.runs.run import RunStep
from worker.store.dialect import driver
from worker.store.sql.contract import in_order
from worker.store.sql.postgresql.arrays import Columns, instants, numbers, texts, uuids

# The rows of the runs are locked in the order of ids until the steps are durable: no other worker takes over.
# `state NOT IN` as in `finish`. A step that is stored already is of this attempt: a place is used once.
STORE = """
WITH e AS MATERIALIZED (
  SELECT * FROM unnest((SELECT %s::uuid[]), (SELECT %s::uuid[]), (SELECT %s::bigint[]),
                       (SELECT %s::integer[]), (SELECT %s::text[]), (SELECT %s::integer[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::integer[]),
                       (SELECT %s::timestamptz[]), (SELECT %s::timestamptz[]), (SELECT %s::integer[]),
                       (SELECT %s::text[]))
    AS e(run_id, org_id, fencing_token, attempt, handler, seq, name, key, occurrence, started_at, ended_at,
         size, result)
), ours AS MATERIALIZED (
  SELECT id, fencing_token, recoveries FROM live_runs
  WHERE id = ANY(ARRAY(SELECT run_id FROM e)) AND state NOT IN ('waiting', 'held', 'parked')
  ORDER BY id FOR UPDATE
), moved AS (
  UPDATE live_runs l SET recoveries = 0 FROM ours
  WHERE l.id = ours.id AND ours.recoveries > 0
    AND EXISTS (SELECT 1 FROM e WHERE e.run_id = ours.id AND e.fencing_token = ours.fencing_token)
), stored AS (
  INSERT INTO steps (run_id, org_id, fencing_token, attempt, handler, seq, name, key, occurrence, started_at,
                     ended_at, size, result)
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
