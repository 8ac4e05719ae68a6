"""Waiting: the runs of attempts that ended wait again, for another try or until they are taken up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from worker.ids import RunId, WorkerId
from worker.runs.outcome import EndedAttempt
from worker.store.sql.ending import Ending, Held, settle, sum_up
from worker.store.sql.postgresql.arrays import flags, jsons, microseconds, numbers, plain, texts, words
from worker.store.sql.postgresql.said import Said

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
    held, now = {id_: Held(token, cancelled, reason) for id_, token, cancelled, reason, _ in rows}, rows[0][4]
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
