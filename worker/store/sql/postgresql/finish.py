"""Finish: write ended attempts, checkpoints, progress and log lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection

from worker.ids import DefinitionId, RunId, WorkerId
from worker.model.definitions.budgets import MAX_SUM
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.model.runs.run import AdmittedRun, LogLine
from worker.store.dialect import driver
from worker.store.sql import run_egress, run_words
from worker.store.sql.contract import (
    ADD_TO_DAY,
    ADD_TO_HOUR,
    OF_ATTEMPT,
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
from worker.store.sql.postgresql.arrays import (
    Columns,
    Value,
    distinct,
    flags,
    instants,
    jsons,
    lines,
    numbers,
    plain,
    texts,
    timestamps,
    uuids,
    words,
)
from worker.store.tables import NEVER


def tokens_of(trails: Iterable[Trail]) -> tuple[Value, ...]:
    """The number of each attempt's token, and what is stored of each token."""
    tokens, numbers_of = distinct(trails, _token)
    columns = (
        numbers(range(1, len(tokens) + 1)),
        lines(trail.claims for trail in tokens),
        lines(trail.flags for trail in tokens),
        texts(trail.jti for trail in tokens),
        texts(trail.claims_hash for trail in tokens),
    )
    return numbers_of, *columns


def _token(trail: Trail) -> tuple[int, int, str | None, str | None]:
    """The identity of a token: all its attempts share the same objects."""
    return id(trail.claims), id(trail.flags), trail.jti, trail.claims_hash


# By org: ended runs, ended attempts, and the seconds of their handlers.
Sums = tuple[str, str, str, str]
NO_SUMS: Sums = ("{}", "{}", "{}", "{}")

# Always in the order of ids, and a separate statement: two batches cannot deadlock.
# `state NOT IN` means running, but matches no partial index, so the primary key is used.
LOCK = f"""
SELECT l.id, l.fencing_token, {STOPPED}, clock_timestamp()
FROM live_runs l
WHERE l.id = ANY(%s::uuid[]) AND l.state NOT IN ('waiting', 'held', 'parked')
  AND l.worker_id IS NOT DISTINCT FROM %s::uuid
ORDER BY l.id FOR UPDATE OF l
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

# In a later statement than the lock: it sees every answer that was given before the row was locked.
WAITS = """
SELECT w.run_id, bool_or(w.answered_at IS NOT NULL OR w.timed_out_at IS NOT NULL), min(w.until)
FROM unnest((SELECT %s::uuid[]), (SELECT %s::integer[])) AS e(id, attempt)
JOIN waits w ON w.run_id = e.id AND w.pending_attempt = e.attempt
GROUP BY w.run_id
"""

PARK = """
UPDATE live_runs l SET state = 'parked', reason = e.reason, detail = e.detail, available_at = e.until,
                       failures = e.failures, recoveries = e.recoveries,
                       start_by = CASE WHEN e.keep_start_by THEN l.start_by END,
                       progress = COALESCE(e.progress::jsonb, l.progress), worker_id = NULL,
                       started_at = CASE WHEN e.counted THEN l.started_at END
FROM unnest((SELECT %s::uuid[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::integer[]),
            (SELECT %s::integer[]), (SELECT %s::boolean[]), (SELECT %s::text[]), (SELECT %s::boolean[]),
            (SELECT %s::timestamptz[]))
  AS e(id, reason, detail, failures, recoveries, keep_start_by, progress, counted, until)
WHERE l.id = e.id
"""

# Of a batch: see `tokens_of`.
TOKENS = """
  unnest(%s::integer[], string_to_array(%s::text, chr(30), '')::jsonb[],
         string_to_array(%s::text, chr(30), '')::jsonb[], %s::text[], %s::text[])
  AS s(said, claims, flags, jti, claims_hash)
""".strip()

ATTEMPTS = f"""
INSERT INTO attempts ({OF_ATTEMPT})
SELECT a.run_id, a.attempt, a.org_id, %s, a.fencing_token, a.handler, a.started_at, a.token_ready_at,
       a.handler_started_at, a.ended_at, a.outcome, a.error::jsonb, a.error_cause, s.claims, s.flags, s.jti,
       s.claims_hash, a.peak_memory
FROM unnest(%s::uuid[], %s::integer[], %s::uuid[], %s::bigint[], %s::text[], %s::timestamptz[],
            %s::timestamptz[], %s::timestamptz[], %s::timestamptz[], %s::text[], %s::text[], %s::text[],
            %s::bigint[], %s::integer[])
  AS a(run_id, attempt, org_id, fencing_token, handler, started_at, token_ready_at, handler_started_at,
       ended_at, outcome, error, error_cause, peak_memory, said)
JOIN {TOKENS} ON s.said = a.said
"""


def _seconds(values: Iterable[timedelta | None]) -> str:
    return plain((value or timedelta()).total_seconds() for value in values)


# Of an `Ending`.
_WHY = ((plain, "attempt.run_id"), (texts, "reason attempt.detail"))
_COUNTS = (
    (plain, "attempt.failures attempt.recoveries"),
    (flags, "attempt.keep_start_by"),
    (jsons, "attempt.trail.progress"),
)
WAITING = Columns(*_WHY, (_seconds, "attempt.available_after"), *_COUNTS)
PARKED = Columns(*_WHY, *_COUNTS, (flags, "attempt.counted"))
ENDED = Columns(
    (uuids, "attempt.run_id"),
    (numbers, "attempt.attempt"),
    (uuids, "attempt.org_id"),
    (numbers, "attempt.fencing_token"),
    (texts, "attempt.trail.handler"),
    (instants, "attempt.started_at attempt.trail.token_ready_at"),
    (instants, "attempt.trail.handler_started_at ended_at"),
    (words, "attempt.outcome"),
    (jsons, "attempt.error"),
    (texts, "attempt.error_cause"),
    (plain, "attempt.trail.peak_memory"),
)


def wait_again(
    raw: Any, worker_id: WorkerId, ended: Sequence[EndedAttempt]
) -> tuple[set[RunId], list[EndedAttempt], Sums]:
    """Lock the runs of `ended`, which is in the order of run ids, and let those wait or park that go on.

    Returns the runs that go on, the attempts that end their runs, and the sums of what was written
    here. A run that is stopped ends instead: see `STOPPED`.
    """
    rows = raw.execute(LOCK, (uuids(attempt.run_id for attempt in ended), worker_id)).fetchall()
    final = [attempt for attempt in ended if attempt.final]
    if not rows:
        return set(), final, NO_SUMS
    locked = {id_: LockedRun(token, stopped, reason) for id_, token, stopped, reason, _ in rows}
    now = rows[0][4]
    settled, _ = end_runs((attempt for attempt in ended if not attempt.final), locked, now)
    waiting = [ending for ending in settled if ending.state == "waiting"]
    parked = [ending for ending in settled if ending.state == "parked"]
    asleep: list[tuple[Ending, datetime | None]] = []
    if parked:
        awake, asleep = wake(parked, _waits_of(raw, parked), now)
        waiting += awake
    cancelled = [ending for ending in settled if ending.final]
    final += [replace(ending.attempt, state=ending.state, reason=ending.reason) for ending in cancelled]
    ongoing = [*waiting, *(ending for ending, _ in asleep)]
    if ongoing:
        tokens = tokens_of(ending.attempt.trail for ending in ongoing)
        with raw.pipeline():
            if waiting:
                raw.execute(WAIT, WAITING.of(waiting))
            if asleep:
                until = timestamps(at or NEVER for _, at in asleep)
                raw.execute(PARK, (*PARKED.of([ending for ending, _ in asleep]), until))
            raw.execute(ATTEMPTS, (worker_id, *ENDED.of(ongoing), *tokens))
    sums = [(org_id, 0, attempts, seconds) for _, org_id, _, attempts, seconds in sum_up(ongoing, now).days]
    orgs, runs, attempts, seconds = map(plain, zip(*sums, strict=True)) if sums else NO_SUMS
    return {ending.attempt.run_id for ending in ongoing}, final, (orgs, runs, attempts, seconds)


def _waits_of(raw: Any, parked: Sequence[Ending]) -> dict[RunId, OpenWaits]:
    values = plain(ending.attempt.run_id for ending in parked), plain(e.attempt.attempt for e in parked)
    return {id_: OpenWaits(over, until) for id_, over, until in raw.execute(WAITS, values)}


# Everything that an end writes, in one statement: a row that the DELETE finds is still the caller's, and
# only such rows are written. `(SELECT …)` around an array hides its length: PostgreSQL then plans for a few
# rows; with a known length it plans a merge with the whole index. The array of ids is walked in their order,
# so that two batches cannot deadlock. A full join is never a nested loop, which a join with `live_runs` would
# become if its statistics are of a moment without runs: each row with all of the batch. Without CASE it
# would be no full join. `state NOT IN` as in LOCK. The sums of orgs come last, in the order
# of orgs, days first, as in `add_rollups`; they include the attempts whose runs wait again.
END = f"""
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now
), e AS MATERIALIZED (
  SELECT * FROM unnest((SELECT %s::uuid[]), (SELECT %s::bigint[]), (SELECT %s::text[]), (SELECT %s::text[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]),
                       (SELECT %s::text[]), (SELECT %s::text[]), (SELECT %s::text[]),
                       (SELECT %s::timestamptz[]), (SELECT %s::timestamptz[]), (SELECT %s::timestamptz[]),
                       (SELECT %s::bigint[]), (SELECT %s::integer[]))
    AS e(id, fencing_token, state, reason, detail, progress, result, error, error_cause, handler, outcome,
         token_ready_at, handler_started_at, ended_at, peak_memory, said)
), deleted AS (
  DELETE FROM live_runs l
  WHERE l.id = ANY(ARRAY(SELECT id FROM e)) AND l.state NOT IN ('waiting', 'held', 'parked')
    AND l.worker_id IS NOT DISTINCT FROM %s::uuid
    AND ((l.id, l.fencing_token) IN (SELECT id, fencing_token FROM e)) IS TRUE
  RETURNING l.id, l.org_id, l.origin, l.available_at, l.started_at, l.attempt, l.fencing_token,
            l.worker_id, l.progress
), gone AS MATERIALIZED (
  SELECT l.id, l.org_id, l.origin, l.available_at, l.started_at, l.attempt, l.fencing_token, l.worker_id,
         COALESCE(e.progress::jsonb, l.progress) AS progress, e.state, e.reason, e.detail, e.result,
         e.error::jsonb AS error, e.error_cause, e.handler, e.outcome, e.peak_memory, e.said,
         e.token_ready_at, e.handler_started_at,
         GREATEST(l.started_at, LEAST(e.ended_at, (SELECT now FROM c))) AS ended_at
  FROM deleted l FULL JOIN e ON e.id = l.id AND e.fencing_token = l.fencing_token
  WHERE CASE WHEN l.id IS NULL THEN false ELSE true END
), written AS (
  INSERT INTO attempts ({OF_ATTEMPT})
  SELECT g.id, g.attempt, g.org_id, g.worker_id, g.fencing_token, g.handler, g.started_at, g.token_ready_at,
         g.handler_started_at, g.ended_at, g.outcome, g.error, g.error_cause, s.claims, s.flags, s.jti,
         s.claims_hash, g.peak_memory
  FROM gone g
  JOIN {TOKENS} ON s.said = g.said
), days AS (
  INSERT INTO rollup_days (day, org_id, runs, attempts, handler_seconds)
  SELECT (SELECT now::date FROM c), org_id, sum(runs), sum(attempts), round(sum(seconds))
  FROM (
    SELECT org_id, 1 AS runs, 1 AS attempts,
           GREATEST(0, extract(epoch FROM ended_at - handler_started_at)) AS seconds FROM gone
    UNION ALL
    SELECT * FROM unnest(%s::uuid[], %s::integer[], %s::integer[], %s::bigint[])) s
  GROUP BY org_id ORDER BY org_id
  {ADD_TO_DAY}
  RETURNING 1
), hours AS (
  INSERT INTO rollup_hours (hour, org_id, state, runs)
  SELECT (SELECT date_trunc('hour', now) FROM c), org_id, state, count(*) FROM gone
  WHERE (SELECT count(*) FROM days) > 0 AND origin <> 'child'
  GROUP BY org_id, state ORDER BY org_id, state
  {ADD_TO_HOUR}
)
UPDATE runs r SET state = g.state, reason = g.reason, detail = g.detail, available_at = g.available_at,
                  started_at = g.started_at, finished_at = (SELECT now FROM c), attempt = g.attempt,
                  result_fencing_token = g.fencing_token, worker_id = g.worker_id, progress = g.progress,
                  result = g.result::jsonb, error = g.error
FROM gone g
WHERE r.id = g.id AND r.state IS NULL
RETURNING r.id
"""

# For a batch in which a success changes the state of its definition. A definition's runs that may do so run
# one at a time, so no two batches wait for each other here, whatever they have locked before.
STATES = """), states AS (
  INSERT INTO definition_states AS d (definition_id, org_id, data, version, updated_at, updated_by, run_id)
  SELECT DISTINCT ON (s.definition_id) s.definition_id, g.org_id, s.data, 1, (SELECT now FROM c), 'worker',
         g.id
  FROM gone g
  JOIN unnest(%s::uuid[], %s::uuid[], %s::jsonb[]) AS s(run_id, definition_id, data) ON s.run_id = g.id
  WHERE g.state = 'succeeded'
  ORDER BY s.definition_id, g.id DESC
  ON CONFLICT (definition_id) DO UPDATE SET data = excluded.data, version = d.version + 1,
    updated_at = excluded.updated_at, updated_by = excluded.updated_by, run_id = excluded.run_id
"""
DAYS_OF_END = "), days AS ("
END_WITH_STATES = END.replace(DAYS_OF_END, STATES + DAYS_OF_END)

WRITTEN = """
SELECT a.run_id
FROM unnest(%s::uuid[], %s::integer[], %s::bigint[], %s::text[]) AS e(id, attempt, fencing_token, outcome)
JOIN attempts a ON a.run_id = e.id AND a.attempt = e.attempt
WHERE a.fencing_token = e.fencing_token AND a.outcome = e.outcome AND a.worker_id = %s
"""

DAYS = f"""
INSERT INTO rollup_days (day, org_id, runs, attempts, handler_seconds)
SELECT * FROM unnest(%s::date[], %s::uuid[], %s::bigint[], %s::bigint[], %s::bigint[]) {ADD_TO_DAY}
"""

HOURS = f"""
INSERT INTO rollup_hours (hour, org_id, state, runs)
SELECT * FROM unnest(%s::timestamptz[], %s::uuid[], %s::text[], %s::bigint[]) {ADD_TO_HOUR}
"""

NAMES = "SELECT id, name FROM definitions WHERE id = ANY(%s::uuid[])"

# After the attempts: those of a fenced attempt are not stored, and neither are its words.
WORDS = """
INSERT INTO run_words (word, run_id, org_id, shown)
SELECT w.word, w.run_id, w.org_id, w.shown
FROM unnest(%s::text[], %s::uuid[], %s::uuid[], %s::boolean[], %s::integer[], %s::bigint[])
  AS w(word, run_id, org_id, shown, attempt, fencing_token)
JOIN attempts a ON a.run_id = w.run_id AND a.attempt = w.attempt AND a.fencing_token = w.fencing_token
WHERE a.worker_id IS NOT DISTINCT FROM %s::uuid
ON CONFLICT DO NOTHING
"""

SENT_BEFORE = f"""
SELECT run_id, {run_egress.COLUMNS} FROM run_egress WHERE run_id = ANY(%s::uuid[]) ORDER BY run_id, origin
"""

# As WORDS. An end that is written again, and one of an earlier attempt, changes nothing.
SENT = f"""
INSERT INTO run_egress AS sent (run_id, org_id, attempt, {run_egress.COLUMNS})
SELECT DISTINCT ON (e.run_id, e.origin) e.run_id, e.org_id, e.attempt, e.origin, e.requests, e.bytes_out,
       e.bytes_in, e.statuses::jsonb, e.denied, e.waited_seconds
FROM unnest(%s::uuid[], %s::uuid[], %s::integer[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[],
            %s::text[], %s::bigint[], %s::float8[], %s::bigint[])
  AS e(run_id, org_id, attempt, {run_egress.COLUMNS}, fencing_token)
JOIN attempts a ON a.run_id = e.run_id AND a.attempt = e.attempt AND a.fencing_token = e.fencing_token
WHERE a.worker_id IS NOT DISTINCT FROM %s::uuid
ORDER BY e.run_id, e.origin, e.attempt DESC
ON CONFLICT (run_id, origin) DO UPDATE
SET attempt = excluded.attempt, requests = excluded.requests, bytes_out = excluded.bytes_out,
    bytes_in = excluded.bytes_in, statuses = excluded.statuses, denied = excluded.denied,
    waited_seconds = excluded.waited_seconds
WHERE sent.attempt < excluded.attempt
"""

# Before SENT, whose rows say what is counted already. The order of rows is that of all who add to these sums.
USED = f"""
INSERT INTO meter_days AS used_before (day, org_id, meter, definition_id, used)
SELECT (SELECT clock_timestamp()::date), e.org_id, e.meter, e.definition_id,
       LEAST(sum(e.amount), {MAX_SUM})
FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::integer[], %s::text[], %s::bigint[], %s::bigint[])
  AS e(run_id, org_id, definition_id, attempt, meter, amount, fencing_token)
JOIN attempts a ON a.run_id = e.run_id AND a.attempt = e.attempt AND a.fencing_token = e.fencing_token
WHERE a.worker_id IS NOT DISTINCT FROM %s::uuid
  AND NOT EXISTS (SELECT 1 FROM run_egress s WHERE s.run_id = e.run_id AND s.attempt >= e.attempt)
GROUP BY e.org_id, e.meter, e.definition_id ORDER BY e.org_id, e.meter, e.definition_id
ON CONFLICT (day, org_id, meter, definition_id)
DO UPDATE SET used = LEAST(used_before.used + excluded.used, {MAX_SUM})
"""

# The start deadline counts from the promotion. A row that is locked is left to the next sweep: the sums of
# orgs are locked already here, and they come last everywhere else.
PROMOTE = """
UPDATE live_runs h SET state = 'waiting', reason = 'due', available_at = n.now,
                       start_by = n.now + (h.start_by - h.available_at)
FROM (SELECT clock_timestamp() AS now) n
WHERE h.id = ANY(ARRAY(
  SELECT h.id FROM live_runs h
  WHERE h.state = 'held' {of}
    AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.definition_id = h.definition_id
                    AND l.serial AND l.state IN ('waiting', 'running', 'parked'))
  FOR UPDATE SKIP LOCKED))
"""
PROMOTE_ALL = PROMOTE.format(of="")
# The array is hidden, as in END: planned once for all batches. Mostly nothing is held.
PROMOTE_OF = PROMOTE.format(of="AND h.definition_id = ANY(ARRAY(SELECT unnest((SELECT %s::uuid[]))))")


# Of an `EndedAttempt`.
FINAL = Columns(
    (uuids, "run_id"),
    (numbers, "fencing_token"),
    (words, "state"),
    (texts, "reason detail"),
    (jsons, "trail.progress"),
    (texts, "result"),
    (jsons, "error"),
    (texts, "error_cause trail.handler"),
    (words, "outcome"),
    (instants, "trail.token_ready_at trail.handler_started_at ended_at"),
    (plain, "trail.peak_memory"),
)
STATE = Columns((uuids, "run_id definition_id"), (texts, "definition_state"))
FENCED = Columns((plain, "run_id attempt fencing_token outcome"))
# Of a `RunWord`.
SAID = Columns((texts, "word"), (plain, "run_id org_id"), (flags, "shown"), (plain, "attempt fencing_token"))
# Of a `StoredEgress`.
TOTALS = Columns(
    (plain, "run_id org_id attempt"),
    (texts, "total.origin"),
    (plain, "total.requests total.bytes_out total.bytes_in"),
    (jsons, "total.statuses"),
    (plain, "total.denied total.waited_seconds fencing_token"),
)
# Of a `Used`.
COUNTED = Columns((plain, "run_id org_id definition_id attempt meter amount fencing_token"))


def finish(connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]) -> set[RunId]:
    raw = driver(connection)
    final = sorted(ended, key=attrgetter("run_id"))
    waiting, sums = set[RunId](), NO_SUMS
    if any(not attempt.final for attempt in final):
        waiting, final, sums = wait_again(raw, worker_id, final)
    if len({attempt.run_id for attempt in final}) < len(final):
        # Given twice, it is written once.
        final = [*{(attempt.run_id, attempt.fencing_token): attempt for attempt in final}.values()]
    said = _words_of(raw, ended)
    sending = run_egress.sending(ended)
    sent = _sent_by(raw, sending)
    # With COMMIT in the same pipeline: other workers wait for the sums of the same orgs.
    with raw.pipeline():
        number, *tokens = tokens_of(attempt.trail for attempt in final)
        states = [attempt for attempt in final if attempt.definition_state is not None]
        changed = STATE.of(states) if states else ()
        values = (*FINAL.of(final), number, worker_id, *tokens, *changed, *sums)
        rows = raw.execute(END_WITH_STATES if states else END, values)
        if final:
            promote(connection, [attempt.definition_id for attempt in final])
        if said:
            raw.execute(WORDS, (*SAID.of(said), worker_id))
        if sending:
            if used := run_egress.used_by(sending):
                raw.execute(USED, (*COUNTED.of(used), worker_id))
            raw.execute(SENT, (*TOTALS.of(sent), worker_id))
        raw.execute("COMMIT", prepare=False)
    accepted = waiting.union(id_ for (id_,) in rows.fetchall())
    fenced = [attempt for attempt in ended if attempt.run_id not in accepted]
    return accepted | _written(raw, worker_id, fenced) if fenced else accepted


def _words_of(raw: Any, ended: Sequence[EndedAttempt]) -> list[run_words.RunWord]:
    telling = run_words.telling(ended)
    if not telling:
        return []
    names = raw.execute(NAMES, (plain({attempt.definition_id for attempt in telling}),))
    return run_words.words_of(telling, dict(names.fetchall()))


def _sent_by(raw: Any, sending: Sequence[EndedAttempt]) -> list[run_egress.StoredEgress]:
    run_ids = run_egress.repeated(sending)
    before = run_egress.by_run(raw.execute(SENT_BEFORE, (plain(run_ids),))) if run_ids else {}
    return run_egress.totals_of(sending, before)


def add_rollups(connection: Connection, rollups: Rollups) -> None:
    if not rollups.days:
        return
    raw = driver(connection)
    days = [list(column) for column in zip(*rollups.days, strict=True)]
    with raw.pipeline():
        raw.execute(DAYS, tuple(plain(column) for column in days))
        if rollups.hours:
            hours, *rest = [list(column) for column in zip(*rollups.hours, strict=True)]
            raw.execute(HOURS, (timestamps(hours), *(plain(column) for column in rest)))


def promote(connection: Connection, definitions: Sequence[DefinitionId] | None) -> int:
    raw = driver(connection)
    if definitions is None:
        promoted: int = raw.execute(PROMOTE_ALL).rowcount
    else:
        promoted = raw.execute(PROMOTE_OF, (uuids(sorted(set(definitions))),)).rowcount
    return promoted


def _written(raw: Any, worker_id: WorkerId, fenced: Sequence[EndedAttempt]) -> set[RunId]:
    """The runs that an earlier write of ours ended, whose answer was lost."""
    return {id_ for (id_,) in raw.execute(WRITTEN, (*FENCED.of(fenced), worker_id))}


# `state NOT IN` as in LOCK. The row stays locked until the checkpoint is durable: no other worker takes over.
SAVE = """
WITH ours AS (
  SELECT id, recoveries FROM live_runs
  WHERE id = %(run)s AND fencing_token = %(token)s AND state NOT IN ('waiting', 'held', 'parked') FOR UPDATE
), moved AS (
  UPDATE live_runs l SET recoveries = 0 FROM ours
  WHERE l.id = ours.id AND ours.recoveries > 0
    AND (SELECT data FROM checkpoints WHERE run_id = %(run)s) IS DISTINCT FROM %(data)s::jsonb
), saved AS (
  INSERT INTO checkpoints (run_id, org_id, attempt, fencing_token, number, saved_at, data, handler)
  SELECT id, %(org)s, %(attempt)s, %(token)s, %(number)s, clock_timestamp(), %(data)s::jsonb, %(handler)s
  FROM ours
  ON CONFLICT (run_id) DO UPDATE SET attempt = excluded.attempt, fencing_token = excluded.fencing_token,
                                     number = excluded.number, saved_at = excluded.saved_at,
                                     data = excluded.data,
                                     handler = COALESCE(checkpoints.handler, excluded.handler)
  WHERE checkpoints.fencing_token < excluded.fencing_token OR checkpoints.number <= excluded.number
)
SELECT 1 FROM ours
"""

LOCK_ALL = "SELECT 1 FROM live_runs WHERE id = ANY(%s::uuid[]) ORDER BY id FOR UPDATE"

PROGRESS = """
UPDATE live_runs l SET progress = p.progress::jsonb
FROM unnest(%s::uuid[], %s::bigint[], %s::text[]) AS p(id, fencing_token, progress)
WHERE l.id = p.id AND l.fencing_token = p.fencing_token AND l.state NOT IN ('waiting', 'held', 'parked')
"""

LINES = """
INSERT INTO run_logs (run_id, attempt, seq, org_id, at, level, source, text)
SELECT * FROM unnest(%s::uuid[], %s::integer[], %s::integer[], %s::uuid[], %s::timestamptz[], %s::text[],
                     %s::text[], %s::text[])
ON CONFLICT DO NOTHING
"""


LOG_LINES = Columns((plain, "run_id attempt seq org_id"), (timestamps, "at"), (texts, "level source text"))


def save_checkpoint(
    connection: Connection, run: AdmittedRun, handler: str, data_json: str, *, number: int = 0
) -> bool:
    ids = {"run": run.id, "token": run.fencing_token, "org": run.org_id, "attempt": run.attempt}
    values = {**ids, "handler": handler, "data": data_json, "number": number}
    return driver(connection).execute(SAVE, values).fetchone() is not None


def write_progress(connection: Connection, rows: Sequence[Progress]) -> None:
    raw = driver(connection)
    ids = plain(run_id for run_id, _, _ in rows)
    with raw.pipeline():
        raw.execute(LOCK_ALL, (ids,))
        raw.execute(
            PROGRESS, (ids, plain(token for _, token, _ in rows), jsons(progress for _, _, progress in rows))
        )


def append_logs(connection: Connection, rows: Sequence[LogLine]) -> None:
    driver(connection).execute(LINES, LOG_LINES.of(rows))
