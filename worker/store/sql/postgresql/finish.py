"""Finish: attempts that ended are written; their runs end, or wait for another attempt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection

from worker.ids import DefinitionId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt, Trail
from worker.store.connection import driver
from worker.store.engine import shared_json
from worker.store.sql.ending import Ending, LockedRun, Rollups, settle, sum_up
from worker.store.sql.postgresql.arrays import (
    flags,
    instants,
    jsons,
    microseconds,
    numbers,
    plain,
    texts,
    words,
)


class Said:
    """`columns` are the tokens' numbers, claims, flags, jti and hashes; `places` each attempt's number."""

    def __init__(self, trails: Sequence[Trail]) -> None:
        said = {_token(trail): trail for trail in trails}
        place_of = {token: place for place, token in enumerate(said, 1)}
        tokens = said.values()
        self.places = numbers(place_of[_token(trail)] for trail in trails)
        self.columns = (
            numbers(place_of.values()),
            texts(None if trail.claims is None else shared_json(trail.claims) for trail in tokens),
            texts(None if trail.flags is None else shared_json(trail.flags) for trail in tokens),
            texts(trail.jti for trail in tokens),
            texts(trail.claims_hash for trail in tokens),
        )


def _token(trail: Trail) -> tuple[int, int, str | None, str | None]:
    """What tells one token's words from another's: they are the same objects in each of its attempts."""
    return id(trail.claims), id(trail.flags), trail.jti, trail.claims_hash


# By org: how many runs ended, how many attempts, and the seconds of their handlers.
Sums = tuple[str, str, str, str]
NOBODY: Sums = ("{}", "{}", "{}", "{}")

# Always in the order of ids, and a statement of its own: two batches never wait in a circle.
# `state NOT IN` is running by words that fit no partial index: the primary key is meant.
LOCK = """
SELECT id, fencing_token, cancel_requested_at IS NOT NULL, cancel_reason, clock_timestamp()
FROM live_runs
WHERE id = ANY(%s::uuid[]) AND state NOT IN ('waiting', 'held') AND worker_id IS NOT DISTINCT FROM %s::uuid
ORDER BY id FOR UPDATE
"""

WAIT = """
UPDATE live_runs l SET state = 'waiting', reason = e.reason, detail = e.detail,
                       available_at = clock_timestamp() + make_interval(secs => e.after),
                       failures = e.failures, recoveries = e.recoveries,
                       start_by = CASE WHEN e.keep_start_by THEN l.start_by END,
                       progress = COALESCE(e.progress::jsonb, l.progress),
                       worker_id = NULL, started_at = NULL
FROM unnest((SELECT %s::uuid[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::float8[]),
            (SELECT %s::integer[]), (SELECT %s::integer[]), (SELECT %s::boolean[]), (SELECT %s::text[]))
  AS e(id, reason, detail, after, failures, recoveries, keep_start_by, progress)
WHERE l.id = e.id
"""

ATTEMPTS = """
INSERT INTO attempts (run_id, attempt, org_id, worker_id, fencing_token, handler, started_at, token_ready_at,
                      handler_started_at, ended_at, outcome, error, error_cause, claims, flags, jti,
                      claims_hash, peak_memory)
SELECT a.run_id, a.attempt, a.org_id, %s, a.fencing_token, a.handler, to_timestamp(a.started_at / 1e6),
       to_timestamp(a.token_ready_at / 1e6), to_timestamp(a.handler_started_at / 1e6),
       to_timestamp(a.ended_at / 1e6), a.outcome, a.error::jsonb, a.error_cause, s.claims, s.flags, s.jti,
       s.claims_hash, a.peak_memory
FROM unnest(%s::uuid[], %s::integer[], %s::uuid[], %s::bigint[], %s::text[], %s::float8[], %s::float8[],
            %s::float8[], %s::float8[], %s::text[], %s::text[], %s::text[], %s::bigint[], %s::integer[])
  AS a(run_id, attempt, org_id, fencing_token, handler, started_at, token_ready_at, handler_started_at,
       ended_at, outcome, error, error_cause, peak_memory, said)
JOIN unnest(%s::integer[], %s::jsonb[], %s::jsonb[], %s::text[], %s::text[])
  AS s(said, claims, flags, jti, claims_hash) ON s.said = a.said
"""


def wait_again(
    raw: Any, worker_id: WorkerId, ended: Sequence[EndedAttempt]
) -> tuple[set[RunId], list[EndedAttempt], Sums]:
    """Let the runs of such attempts among `ended` wait, and lock all, which are in order of run ids.

    Gives the runs that wait, what is left to be ended for good, and the sums of what was
    written here. A run that someone asked to cancel does not wait again: its row says so.
    """
    rows = raw.execute(LOCK, (words(attempt.run_id for attempt in ended), worker_id)).fetchall()
    final = [attempt for attempt in ended if attempt.state != "waiting"]
    if not rows:
        return set(), final, NOBODY
    held, now = (
        {id_: LockedRun(token, cancelled, reason) for id_, token, cancelled, reason, _ in rows},
        rows[0][4],
    )
    settled, _ = settle((attempt for attempt in ended if attempt.state == "waiting"), held, now)
    waiting = [ending for ending in settled if not ending.final]
    cancelled = [ending for ending in settled if ending.final]
    final += [replace(ending.attempt, state=ending.state, reason=ending.reason) for ending in cancelled]
    if waiting:
        with raw.pipeline():
            _wait(raw, waiting)
            _write_attempts(raw, worker_id, waiting)
    sums = [(org_id, 0, attempts, seconds) for _, org_id, _, attempts, seconds in sum_up(waiting, now).days]
    orgs, runs, attempts, seconds = map(plain, zip(*sums, strict=True)) if sums else NOBODY
    return {ending.attempt.run_id for ending in waiting}, final, (orgs, runs, attempts, seconds)


def _wait(raw: Any, endings: Sequence[Ending]) -> None:
    attempts = [ending.attempt for ending in endings]
    raw.execute(
        WAIT,
        (
            plain(attempt.run_id for attempt in attempts),
            texts(ending.reason for ending in endings),
            texts(attempt.detail for attempt in attempts),
            plain((attempt.available_after or timedelta()).total_seconds() for attempt in attempts),
            plain(attempt.failures for attempt in attempts),
            plain(attempt.recoveries for attempt in attempts),
            flags(attempt.keep_start_by for attempt in attempts),
            jsons(attempt.trail.progress for attempt in attempts),
        ),
    )


def _write_attempts(raw: Any, worker_id: WorkerId, endings: Sequence[Ending]) -> None:
    attempts = [ending.attempt for ending in endings]
    trails = [attempt.trail for attempt in attempts]
    said = Said(trails)
    raw.execute(
        ATTEMPTS,
        (
            worker_id,
            words(attempt.run_id for attempt in attempts),
            numbers(attempt.attempt for attempt in attempts),
            words(attempt.org_id for attempt in attempts),
            numbers(attempt.fencing_token for attempt in attempts),
            texts(trail.handler for trail in trails),
            microseconds(attempt.started_at for attempt in attempts),
            microseconds(trail.token_ready_at for trail in trails),
            microseconds(trail.handler_started_at for trail in trails),
            microseconds(ending.ended_at for ending in endings),
            words(attempt.outcome for attempt in attempts),
            jsons(attempt.error for attempt in attempts),
            texts(attempt.error_cause for attempt in attempts),
            plain(trail.peak_memory for trail in trails),
            said.places,
            *said.columns,
        ),
    )


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
