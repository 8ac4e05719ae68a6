"""Finish: attempts that ended are written, and their runs end; those that wait again are in `waiting`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection

from worker.ids import DefinitionId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt
from worker.store.connection import driver
from worker.store.sql.ending import Rollups
from worker.store.sql.postgresql.arrays import (
    instants,
    jsons,
    microseconds,
    numbers,
    plain,
    texts,
    words,
)
from worker.store.sql.postgresql.said import Said
from worker.store.sql.postgresql.waiting import NOBODY, Sums, wait_again

# All that an end writes, in one statement: each row that the DELETE finds is still the caller's, and
# nothing is written of another. `(SELECT …)` around an array hides its length: what comes is planned
# as a few rows, each looked up in the order of ids in which it comes, so that two batches never wait
# in a circle; a join with an array of a known length was planned as a merge with the whole index.
# `state NOT IN` is running by words that fit no partial index: the primary key is meant.
# The sums of orgs come last, in the order of orgs, those of days first, as in `add_rollups`; with them
# those of the attempts whose runs wait again.
END = """
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now
), e AS MATERIALIZED (
  SELECT * FROM unnest((SELECT %s::uuid[]), (SELECT %s::bigint[]), (SELECT %s::text[]), (SELECT %s::text[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::float8[]),
                       (SELECT %s::float8[]), (SELECT %s::float8[]), (SELECT %s::bigint[]),
                       (SELECT %s::integer[]))
    AS e(id, fencing_token, state, reason, detail, progress, result, error, error_cause, handler, outcome,
         token_ready_at, handler_started_at, ended_at, peak_memory, said)
), gone AS (
  DELETE FROM live_runs l USING e
  WHERE l.id = e.id AND l.fencing_token = e.fencing_token AND l.state NOT IN ('waiting', 'held')
    AND l.worker_id IS NOT DISTINCT FROM %s::uuid
  RETURNING l.id, l.org_id, l.available_at, l.started_at, l.attempt, l.fencing_token, l.worker_id,
            COALESCE(e.progress::jsonb, l.progress) AS progress, e.state, e.reason, e.detail, e.result,
            e.error::jsonb AS error, e.error_cause, e.handler, e.outcome, e.peak_memory, e.said,
            to_timestamp(e.token_ready_at / 1e6) AS token_ready_at,
            to_timestamp(e.handler_started_at / 1e6) AS handler_started_at,
            GREATEST(l.started_at, LEAST(to_timestamp(e.ended_at / 1e6), (SELECT now FROM c))) AS ended_at
), written AS (
  INSERT INTO attempts (run_id, attempt, org_id, worker_id, fencing_token, handler, started_at,
                        token_ready_at, handler_started_at, ended_at, outcome, error, error_cause, claims,
                        flags, jti, claims_hash, peak_memory)
  SELECT g.id, g.attempt, g.org_id, g.worker_id, g.fencing_token, g.handler, g.started_at, g.token_ready_at,
         g.handler_started_at, g.ended_at, g.outcome, g.error, g.error_cause, s.claims, s.flags, s.jti,
         s.claims_hash, g.peak_memory
  FROM gone g
  JOIN unnest(%s::integer[], %s::jsonb[], %s::jsonb[], %s::text[], %s::text[])
    AS s(said, claims, flags, jti, claims_hash) ON s.said = g.said
), days AS (
  INSERT INTO rollup_days (day, org_id, runs, attempts, handler_seconds)
  SELECT (SELECT now::date FROM c), org_id, sum(runs), sum(attempts), round(sum(seconds))
  FROM (
    SELECT org_id, 1 AS runs, 1 AS attempts,
           GREATEST(0, extract(epoch FROM ended_at - handler_started_at)) AS seconds FROM gone
    UNION ALL
    SELECT * FROM unnest(%s::uuid[], %s::integer[], %s::integer[], %s::bigint[])) s
  GROUP BY org_id ORDER BY org_id
  ON CONFLICT (day, org_id) DO UPDATE SET runs = rollup_days.runs + excluded.runs,
    attempts = rollup_days.attempts + excluded.attempts,
    handler_seconds = rollup_days.handler_seconds + excluded.handler_seconds
  RETURNING 1
), hours AS (
  INSERT INTO rollup_hours (hour, org_id, state, runs)
  SELECT (SELECT date_trunc('hour', now) FROM c), org_id, state, count(*) FROM gone
  WHERE (SELECT count(*) FROM days) > 0
  GROUP BY org_id, state ORDER BY org_id, state
  ON CONFLICT (hour, org_id, state) DO UPDATE SET runs = rollup_hours.runs + excluded.runs
)
UPDATE runs r SET state = g.state, reason = g.reason, detail = g.detail, available_at = g.available_at,
                  started_at = g.started_at, finished_at = (SELECT now FROM c), attempt = g.attempt,
                  result_fencing_token = g.fencing_token, worker_id = g.worker_id, progress = g.progress,
                  result = g.result::jsonb, error = g.error
FROM gone g
WHERE r.id = g.id AND r.state IS NULL
RETURNING r.id
"""

WRITTEN = """
SELECT a.run_id
FROM unnest(%s::uuid[], %s::integer[], %s::bigint[], %s::text[]) AS e(id, attempt, fencing_token, outcome)
JOIN attempts a ON a.run_id = e.id AND a.attempt = e.attempt
WHERE a.fencing_token = e.fencing_token AND a.outcome = e.outcome AND a.worker_id = %s
"""

DAYS = """
INSERT INTO rollup_days (day, org_id, runs, attempts, handler_seconds)
SELECT * FROM unnest(%s::date[], %s::uuid[], %s::bigint[], %s::bigint[], %s::bigint[])
ON CONFLICT (day, org_id) DO UPDATE SET runs = rollup_days.runs + excluded.runs,
  attempts = rollup_days.attempts + excluded.attempts,
  handler_seconds = rollup_days.handler_seconds + excluded.handler_seconds
"""

HOURS = """
INSERT INTO rollup_hours (hour, org_id, state, runs)
SELECT * FROM unnest(%s::timestamptz[], %s::uuid[], %s::text[], %s::bigint[])
ON CONFLICT (hour, org_id, state) DO UPDATE SET runs = rollup_hours.runs + excluded.runs
"""

# Its start deadline counts from its promotion. One that somebody else has locked is left to the next
# look: here the sums of orgs are locked already, which come last everywhere else.
PROMOTE = """
UPDATE live_runs h SET state = 'waiting', reason = 'due', available_at = n.now,
                       start_by = n.now + (h.start_by - h.available_at)
FROM (SELECT clock_timestamp() AS now) n
WHERE h.id = ANY(ARRAY(
  SELECT h.id FROM live_runs h
  WHERE h.state = 'held' AND (%(all)s OR h.definition_id = ANY(%(definitions)s::uuid[]))
    AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.definition_id = h.definition_id
                    AND l.serial AND l.state IN ('waiting', 'running'))
  FOR UPDATE SKIP LOCKED))
"""


def finish(connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
    raw = driver(connection)
    final = sorted(ended, key=attrgetter("run_id"))
    waiting, sums = set[RunId](), NOBODY
    if any(attempt.state == "waiting" for attempt in final):
        waiting, final, sums = wait_again(raw, worker_id, final)
    # With its COMMIT at once: other workers' sums of the same orgs wait in between.
    with raw.pipeline():
        rows = raw.execute(END, _values(final, worker_id, sums))
        if final:
            promote(connection, [attempt.definition_id for attempt in final])
        raw.execute("COMMIT", prepare=False)
    accepted = waiting.union(id_ for (id_,) in rows.fetchall())
    fenced = [attempt for attempt in ended if attempt.run_id not in accepted]
    return accepted | _written(raw, worker_id, fenced) if fenced else accepted


def add_rollups(connection: Connection, rollups: Rollups) -> None:
    if not rollups.days:
        return
    raw = driver(connection)
    days = [list(column) for column in zip(*rollups.days, strict=True)]
    with raw.pipeline():
        raw.execute(DAYS, tuple(plain(column) for column in days))
        if rollups.hours:
            hours, *rest = [list(column) for column in zip(*rollups.hours, strict=True)]
            raw.execute(HOURS, (instants(hours), *(plain(column) for column in rest)))


def promote(connection: Connection, definitions: Sequence[DefinitionId] | None) -> int:
    values = {"all": definitions is None, "definitions": plain(sorted(set(definitions or ())))}
    promoted: int = driver(connection).execute(PROMOTE, values).rowcount
    return promoted


def _values(attempts: Sequence[EndedAttempt], worker_id: WorkerId, sums: Sums) -> tuple[str, ...]:
    trails = [attempt.trail for attempt in attempts]
    said = Said(trails)
    return (
        words(attempt.run_id for attempt in attempts),
        numbers(attempt.fencing_token for attempt in attempts),
        words(attempt.state for attempt in attempts),
        texts(attempt.reason for attempt in attempts),
        texts(attempt.detail for attempt in attempts),
        jsons(trail.progress for trail in trails),
        texts(attempt.result for attempt in attempts),
        jsons(attempt.error for attempt in attempts),
        texts(attempt.error_cause for attempt in attempts),
        texts(trail.handler for trail in trails),
        words(attempt.outcome for attempt in attempts),
        microseconds(trail.token_ready_at for trail in trails),
        microseconds(trail.handler_started_at for trail in trails),
        microseconds(attempt.ended_at for attempt in attempts),
        plain(trail.peak_memory for trail in trails),
        said.places,
        worker_id,
        *said.columns,
        *sums,
    )


def _written(raw: Any, worker_id: WorkerId, fenced: Sequence[EndedAttempt]) -> set[RunId]:
    """Those of them that an earlier write of ours, whose answer was lost, has ended already."""
    values = (
        plain(attempt.run_id for attempt in fenced),
        plain(attempt.attempt for attempt in fenced),
        plain(attempt.fencing_token for attempt in fenced),
        plain(attempt.outcome for attempt in fenced),
        worker_id,
    )
    return {id_ for (id_,) in raw.execute(WRITTEN, values)}
