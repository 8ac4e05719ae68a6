"""Fire: due definitions make runs and skips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection

from worker.ids import DefinitionId, new_id
from worker.model.runs.run import DueDefinition, NewRun, NewSkip, NextFire, StoredSkip, fold
from worker.store.dialect import driver
from worker.store.sql.contract import OF_LIVE_RUN, OF_RUN, Fired, Specs, shared_spec, shares
from worker.store.sql.postgresql.arrays import (
    Columns,
    distinct,
    flags,
    instants,
    jsons,
    numbers,
    plain,
    texts,
    timestamps,
    uuids,
    words,
)

# The clock is in a subquery: called once, it can be compared along an index. So is the limit: hidden, it does
# not make PostgreSQL plan each call.
LOCK = """
SELECT definition_id, next_scheduled_for FROM schedule
WHERE next_fire_at <= (SELECT clock_timestamp())
ORDER BY next_fire_at LIMIT (SELECT %s::integer) FOR UPDATE SKIP LOCKED
"""
LOCK_NEWEST = LOCK.replace("ORDER BY next_fire_at", "ORDER BY next_fire_at DESC")

# A separate statement: the snapshot of the one that locks is older than its locks. It does not read
# `schedule` again: with old statistics PostgreSQL would walk the index of fire times, past all that is due.
# `LIMIT 1` makes it look each definition up by its key; it might read all of them for a join.
DUE = """
SELECT d.id, d.org_id, o.code, o.timezone, d.name, d.revision, o.pool
FROM unnest((SELECT %s::uuid[])) AS s(definition_id)
CROSS JOIN LATERAL (SELECT * FROM definitions d WHERE d.id = s.definition_id LIMIT 1) d
CROSS JOIN LATERAL (SELECT * FROM orgs o WHERE o.id = d.org_id LIMIT 1) o
"""

CLOCK = "SELECT clock_timestamp()"

# By their keys, as in DUE.
SPECS = """
SELECT r.definition_id, r.revision, r.spec::text
FROM unnest((SELECT %s::uuid[]), (SELECT %s::integer[])) AS p(definition_id, revision)
CROSS JOIN LATERAL (SELECT * FROM definition_revisions r
                    WHERE r.definition_id = p.definition_id AND r.revision = p.revision LIMIT 1) r
"""

# What the runs of a template have in common comes once: a `kind`. `LIMIT 1` instead of EXISTS, which would
# be hashed and so read all runs. `IS TRUE` makes PostgreSQL hash the live rows; a join would become a nested
# loop. Only a serial run can conflict: all ids are new. Returns the runs that were not inserted, mostly none.
INSERT = f"""
WITH new AS (
  SELECT n.*, k.* FROM unnest(
    %s::uuid[], %s::uuid[], %s::uuid[], %s::uuid[], %s::integer[]
  ) WITH ORDINALITY AS n(id, org_id, definition_id, idempotency_key, kind, place)
  JOIN unnest(
    %s::integer[], %s::text[], %s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::uuid[],
    %s::uuid[], %s::jsonb[], %s::jsonb[], %s::text[], %s::integer[], %s::integer[], %s::boolean[],
    %s::timestamptz[], %s::timestamptz[], %s::text[], %s::timestamptz[]
  ) WITH ORDINALITY AS k(
    revision, handler, origin, scheduled_for, created_by, request_key, backfill_id,
    retry_of, params, variant_handlers, isolation, max_concurrent, priority, serial,
    available_at, start_by, pool, created_at, number) ON k.number = n.kind
), fresh AS MATERIALIZED (
  SELECT * FROM new n
  WHERE (n.origin <> 'schedule' OR (
           SELECT r.id FROM runs r WHERE r.definition_id = n.definition_id
           AND r.scheduled_for = n.scheduled_for AND r.origin = 'schedule' LIMIT 1) IS NULL)
    AND (n.request_key IS NULL OR (
           SELECT r.id FROM runs r
           WHERE r.definition_id = n.definition_id AND r.request_key = n.request_key LIMIT 1) IS NULL)
    AND (n.backfill_id IS NULL OR (
           SELECT r.id FROM runs r
           WHERE r.backfill_id = n.backfill_id AND r.scheduled_for = n.scheduled_for LIMIT 1) IS NULL)
), live AS (
  INSERT INTO live_runs ({OF_LIVE_RUN}, state, reason)
  SELECT {OF_LIVE_RUN}, 'waiting', 'due' FROM fresh ORDER BY place
  ON CONFLICT (definition_id) WHERE serial AND state IN ('waiting', 'running', 'parked') DO NOTHING
  RETURNING id
), run AS (
  INSERT INTO runs ({OF_RUN}, created_at)
  SELECT {OF_RUN}, COALESCE(created_at, clock_timestamp())
  FROM fresh WHERE (id IN (SELECT id FROM live)) IS TRUE ORDER BY place
)
SELECT i.id, i.id IN (SELECT id FROM fresh) FROM unnest((SELECT %s::uuid[])) AS i(id)
WHERE (i.id IN (SELECT id FROM live)) IS NOT TRUE
"""

LAST_SKIPS = """
SELECT s.* FROM unnest(%s::uuid[]) AS d(id)
CROSS JOIN LATERAL (
  SELECT s.id, s.definition_id, s.org_id, s.revision, s.skipped_from, s.skipped_until, s.count, s.reason
  FROM skips s WHERE s.definition_id = d.id ORDER BY s.skipped_from DESC LIMIT 1) s
"""

RAN_BEFORE = """
SELECT p.definition_id, p.skipped_from, (
  SELECT r.scheduled_for FROM runs r
  WHERE r.definition_id = p.definition_id AND r.origin = 'schedule' AND r.scheduled_for < p.skipped_from
  ORDER BY r.scheduled_for DESC LIMIT 1)
FROM unnest(%s::uuid[], %s::timestamptz[]) AS p(definition_id, skipped_from)
"""

GROW = """
UPDATE skips s SET skipped_until = g.skipped_until, count = g.count
FROM unnest(%s::uuid[], %s::timestamptz[], %s::integer[]) AS g(id, skipped_until, count)
WHERE s.id = g.id
"""

SKIP = """
INSERT INTO skips (id, org_id, definition_id, revision, skipped_from, skipped_until, count, reason)
SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::integer[], %s::timestamptz[],
                     %s::timestamptz[], %s::integer[], %s::text[])
ON CONFLICT DO NOTHING
"""

# `(SELECT …)` hides the length of an array, so that each row is looked up; see END in `finish`.
NEXT = """
UPDATE schedule s SET next_scheduled_for = n.next_scheduled_for, next_fire_at = n.next_fire_at
FROM unnest((SELECT %s::uuid[]), (SELECT %s::timestamptz[]), (SELECT %s::timestamptz[])) AS n(
       definition_id, next_scheduled_for, next_fire_at)
WHERE s.definition_id = n.definition_id
"""

FIRST = """
SELECT clock_timestamp(),
       (SELECT next_fire_at FROM schedule WHERE next_fire_at IS NOT NULL ORDER BY next_fire_at LIMIT 1)
"""


def _lists(values: Iterable[Sequence[str]]) -> str:
    return jsons(value or None for value in values)


RUNS = Columns((uuids, "id org_id definition_id idempotency_key"))
KINDS = Columns(
    (numbers, "revision"),
    (texts, "handler"),
    (words, "origin"),
    (instants, "scheduled_for"),
    (texts, "created_by request_key"),
    (plain, "backfill_id retry_of"),
    (jsons, "params"),
    (_lists, "variant_handlers"),
    (words, "isolation"),
    (plain, "max_concurrent"),
    (numbers, "priority"),
    (flags, "serial"),
    (instants, "available_at start_by"),
    (texts, "pool"),
    (instants, "created_at"),
)
_KIND = attrgetter(*(name for name in KINDS.names if name != "params"))
NEXT_FIRES = Columns((uuids, "definition_id"), (instants, "next_scheduled_for next_fire_at"))


def _kind(run: NewRun) -> tuple[Any, int]:
    """Equal for runs that differ only by what `RUNS` has; params, which are not hashable, by identity."""
    return _KIND(run), id(run.params)


GROWN_SKIPS = Columns((plain, "id"), (timestamps, "skip.skipped_until"), (plain, "skip.count"))
NEW_SKIPS = Columns(
    (plain, "org_id definition_id revision"),
    (timestamps, "skipped_from skipped_until"),
    (plain, "count reason"),
)


def fire_first(connection: Connection) -> tuple[datetime, datetime | None]:
    now, first = driver(connection).execute(FIRST).fetchone()
    return now, first


def fire_lock(connection: Connection, *, limit: int, specs: Specs) -> tuple[datetime, list[DueDefinition]]:
    raw = driver(connection)
    oldest, newest = shares(limit)
    # Rows are fetched at once: to iterate over a cursor takes five times as long.
    locked = raw.execute(LOCK, (oldest,)).fetchall()
    if len(locked) == oldest and newest:
        locked += reversed(raw.execute(LOCK_NEWEST, (newest,)).fetchall())
    if not locked:
        (now,) = raw.execute(CLOCK).fetchone()
        return now, []
    with raw.pipeline():
        rows = raw.execute(DUE, (uuids(id_ for id_, _ in locked),))
        clock = raw.execute(CLOCK)
        found = {row[0]: row for row in rows.fetchall()}
        (now,) = clock.fetchone()
    due = [(found[id_], scheduled_for) for id_, scheduled_for in locked if id_ in found]
    # Looked up one by one: a difference of sets would walk the whole cache.
    missing = sorted(pair for row, _ in due if (pair := (row[0], row[5])) not in specs)
    if missing:
        pairs = uuids(id_ for id_, _ in missing), numbers(revision for _, revision in missing)
        for id_, revision, spec in raw.execute(SPECS, pairs).fetchall():
            specs[id_, revision] = shared_spec(spec)
    return now, [
        DueDefinition(id_, org_id, code, timezone, name, revision, at, specs[id_, revision], pool)
        for (id_, org_id, code, timezone, name, revision, pool), at in due
    ]


def fire_write(connection: Connection, runs: Sequence[NewRun], next_fires: Sequence[NextFire]) -> Fired:
    raw, made = driver(connection), None
    # One round trip: no statement needs the answer of another.
    with raw.pipeline():
        if runs:
            kinds, kind_of_each = distinct(runs, _kind)
            ids, *others = RUNS.of(runs)
            made = raw.execute(INSERT, (ids, *others, kind_of_each, *KINDS.of(kinds), ids))
        if next_fires:
            raw.execute(NEXT, NEXT_FIRES.of(next_fires))
        clock = raw.execute(FIRST)
        overlaps = dict(made.fetchall()) if made else {}
        now, first = clock.fetchone()
    inserted = [run for run in runs if run.id not in overlaps] if overlaps else runs
    overlapped = [run for run in runs if overlaps.get(run.id)] if overlaps else []
    return Fired(inserted, overlapped, next_fire_at=first, now=now)


def fire_skips(connection: Connection, skips: Sequence[NewSkip]) -> None:
    raw = driver(connection)
    with raw.pipeline():
        rows = raw.execute(LAST_SKIPS, (plain({skip.definition_id for skip in skips}),))
        ran = raw.execute(
            RAN_BEFORE,
            (plain(skip.definition_id for skip in skips), timestamps(skip.skipped_from for skip in skips)),
        )
        last = {
            definition_id: StoredSkip(
                id_, NewSkip(org_id, definition_id, revision, since, until, count, reason)
            )
            for id_, definition_id, org_id, revision, since, until, count, reason in rows
        }
        ran_before: dict[tuple[DefinitionId, datetime], datetime | None] = {
            (definition_id, since): ran_at for definition_id, since, ran_at in ran
        }
    grown, new = fold(skips, last, ran_before)
    with raw.pipeline():
        raw.execute(GROW, GROWN_SKIPS.of(grown))
        raw.execute(SKIP, (plain(new_id() for _ in new), *NEW_SKIPS.of(new)))
