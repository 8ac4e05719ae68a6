"""Finish: attempts that ended are written, and their runs end or wait again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection

from worker.ids import DefinitionId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt, Trail
from worker.store.connection import driver
from worker.store.engine import shared_json
from worker.store.sql.ending import Ending, Held, Rollups, settle, sum_up
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

# Always in the order of ids, and a statement of its own: two batches never wait in a circle.
# `state NOT IN` is running by words that fit no partial index: the primary key is meant.
LOCK = """
SELECT id, fencing_token, cancel_requested_at IS NOT NULL, cancel_reason, clock_timestamp()
FROM live_runs
WHERE id = ANY(%s::uuid[]) AND state NOT IN ('waiting', 'held') AND worker_id IS NOT DISTINCT FROM %s::uuid
ORDER BY id FOR UPDATE
"""

# `(SELECT …)` around an array hides its length: what comes is planned as a few rows, each looked up
# in the order in which it comes. A join with an array of a known length was planned as a merge with
# the whole index. Answers as LOCK does.
END = """
WITH e AS MATERIALIZED (
  SELECT * FROM unnest((SELECT %s::uuid[]), (SELECT %s::bigint[]), (SELECT %s::text[]), (SELECT %s::text[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]))
    AS e(id, fencing_token, state, reason, detail, progress, result, error)
), gone AS (
  DELETE FROM live_runs l USING e
  WHERE l.id = e.id AND l.fencing_token = e.fencing_token AND l.state NOT IN ('waiting', 'held')
    AND l.worker_id IS NOT DISTINCT FROM %s::uuid
  RETURNING l.id, e.state, e.reason, e.detail, l.available_at, l.started_at, l.attempt, l.fencing_token,
            l.worker_id, COALESCE(e.progress::jsonb, l.progress) AS progress, e.result, e.error
)
UPDATE runs r SET state = g.state, reason = g.reason, detail = g.detail, available_at = g.available_at,
                  started_at = g.started_at, finished_at = clock_timestamp(), attempt = g.attempt,
                  result_fencing_token = g.fencing_token, worker_id = g.worker_id, progress = g.progress,
                  result = g.result::jsonb, error = g.error::jsonb
FROM gone g
WHERE r.id = g.id AND r.state IS NULL
RETURNING r.id, r.result_fencing_token, false, NULL::text, r.finished_at
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

# What a token has said is the same for many attempts: it comes, and is parsed, once.
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

# Its start deadline counts from its promotion.
PROMOTE = """
UPDATE live_runs h SET state = 'waiting', reason = 'due', available_at = n.now,
                       start_by = n.now + (h.start_by - h.available_at)
FROM (SELECT clock_timestamp() AS now) n
WHERE h.state = 'held' AND (%(all)s OR h.definition_id = ANY(%(definitions)s::uuid[]))
  AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.definition_id = h.definition_id
                  AND l.serial AND l.state IN ('waiting', 'running'))
"""


def finish(connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
    raw = driver(connection)
    ended = sorted(ended, key=attrgetter("run_id"))
    waits = any(attempt.state == "waiting" for attempt in ended)
    if waits:
        # A run that would wait again may have been cancelled: its row says so.
        rows = raw.execute(LOCK, (words(attempt.run_id for attempt in ended), worker_id)).fetchall()
    else:
        states = [attempt.state for attempt in ended]
        rows = _end(raw, worker_id, ended, states, [attempt.reason for attempt in ended]).fetchall()
    held = {id_: Held(token, cancelled, reason) for id_, token, cancelled, reason, _ in rows}
    if not rows:
        return _written(raw, worker_id, ended)
    now = rows[0][4]
    endings, fenced = settle(ended, held, now)
    if endings:
        final = [ending for ending in endings if ending.final]
        with raw.pipeline():
            if waits:
                _end_or_wait(raw, worker_id, endings)
            _write_attempts(raw, worker_id, endings)
            if final:
                promote(connection, [ending.attempt.definition_id for ending in final])
            # Last, and its COMMIT at once: other workers' sums of the same orgs wait in between.
            _add(raw, sum_up(endings, now))
            raw.execute("COMMIT", prepare=False)
    accepted = {ending.attempt.run_id for ending in endings}
    return accepted | _written(raw, worker_id, fenced) if fenced else accepted


def add_rollups(connection: Connection, rollups: Rollups) -> None:
    raw = driver(connection)
    with raw.pipeline():
        _add(raw, rollups)


def promote(connection: Connection, definitions: Sequence[DefinitionId] | None) -> int:
    values = {"all": definitions is None, "definitions": plain(sorted(set(definitions or ())))}
    promoted: int = driver(connection).execute(PROMOTE, values).rowcount
    return promoted


def _end(
    raw: Any,
    worker_id: WorkerId,
    attempts: Sequence[EndedAttempt],
    states: Sequence[str],
    reasons: Sequence[str | None],
) -> Any:
    return raw.execute(
        END,
        (
            words(attempt.run_id for attempt in attempts),
            numbers(attempt.fencing_token for attempt in attempts),
            words(states),
            texts(reasons),
            texts(attempt.detail for attempt in attempts),
            jsons(attempt.trail.progress for attempt in attempts),
            texts(attempt.result for attempt in attempts),
            jsons(attempt.error for attempt in attempts),
            worker_id,
        ),
    )


def _end_or_wait(raw: Any, worker_id: WorkerId, endings: Sequence[Ending]) -> None:
    final = [ending for ending in endings if ending.final]
    if final:
        states = [ending.state for ending in final]
        _end(raw, worker_id, [e.attempt for e in final], states, [ending.reason for ending in final])
    waiting = [ending for ending in endings if not ending.final]
    if waiting:
        _wait(raw, waiting)


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
    said = {_token(trail): trail for trail in trails}
    place_of = {token: place for place, token in enumerate(said, 1)}
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
            numbers(place_of[_token(trail)] for trail in trails),
            numbers(place_of.values()),
            texts(None if trail.claims is None else shared_json(trail.claims) for trail in said.values()),
            texts(None if trail.flags is None else shared_json(trail.flags) for trail in said.values()),
            texts(trail.jti for trail in said.values()),
            texts(trail.claims_hash for trail in said.values()),
        ),
    )


def _token(trail: Trail) -> tuple[int, int, str | None, str | None]:
    """What tells one token's words from another's: they are the same objects in each of its attempts."""
    return id(trail.claims), id(trail.flags), trail.jti, trail.claims_hash


def _add(raw: Any, rollups: Rollups) -> None:
    if not rollups.days:
        return
    days = [list(column) for column in zip(*rollups.days, strict=True)]
    raw.execute(DAYS, tuple(plain(column) for column in days))
    if rollups.hours:
        hours, *rest = [list(column) for column in zip(*rollups.hours, strict=True)]
        raw.execute(HOURS, (instants(hours), *(plain(column) for column in rest)))


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
