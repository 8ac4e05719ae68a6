"""Fire: due definitions make runs and skips."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text
from worker.ids import DefinitionId, new_id
from worker.model.runs.run import DueDefinition, NewRun, NewSkip, NextFire, StoredSkip, fold
from worker.store.dialect import driver, file_now
from worker.store.sql.contract import OF_LIVE_RUN, OF_RUN, Fired, Specs, shared_spec, shares
from worker.store.sql.sqlite.values import Rows, instant, json_list, json_text

OLDEST = """
SELECT s.definition_id, s.org_id, o.code, o.timezone, d.name, d.revision, s.next_scheduled_for, o.pool
FROM (SELECT definition_id, org_id, next_scheduled_for, next_fire_at FROM schedule
      WHERE next_fire_at <= ? ORDER BY next_fire_at LIMIT ?) s
CROSS JOIN definitions d ON d.id = s.definition_id
CROSS JOIN orgs o ON o.id = s.org_id
ORDER BY s.next_fire_at
"""
NEWEST = OLDEST.replace("ORDER BY next_fire_at LIMIT", "ORDER BY next_fire_at DESC LIMIT")

SPEC = "SELECT spec FROM definition_revisions WHERE definition_id = ? AND revision = ?"

RUN = f"""
INSERT INTO runs ({OF_RUN}, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, COALESCE(?, ?))
ON CONFLICT DO NOTHING
"""

LIVE = f"""
INSERT INTO live_runs ({OF_LIVE_RUN}, state, reason)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'waiting', 'due')
ON CONFLICT DO NOTHING
"""

INSERTED = """
SELECT r.id, l.id IS NOT NULL FROM json_each(?) e
CROSS JOIN runs r ON r.id = e.value LEFT JOIN live_runs l ON l.id = r.id
"""

UNDO = "DELETE FROM runs WHERE id = ?"

NEXT = "UPDATE schedule SET next_scheduled_for = ?, next_fire_at = ? WHERE definition_id = ?"

FIRST = "SELECT min(next_fire_at) FROM schedule WHERE next_fire_at IS NOT NULL"

LAST_SKIP = """
SELECT id, org_id, revision, skipped_from, skipped_until, count, reason FROM skips
WHERE definition_id = ? ORDER BY skipped_from DESC LIMIT 1
"""

RAN_BEFORE = """
SELECT max(scheduled_for) FROM runs WHERE definition_id = ? AND origin = 'schedule' AND scheduled_for < ?
"""

GROW = "UPDATE skips SET skipped_until = ?, count = ? WHERE id = ?"

SKIP = """
INSERT INTO skips (id, org_id, definition_id, revision, skipped_from, skipped_until, count, reason)
VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""


def _list(values: Sequence[str]) -> str | None:
    return json_text(values or None)


# Of a `NewRun`: the columns of `RUN` before `created_at`, and those of `LIVE`.
RUNS = Rows(
    (None, "id org_id definition_id revision handler origin"),
    (instant, "scheduled_for"),
    (None, "created_by request_key backfill_id retry_of idempotency_key"),
    (json_text, "params"),
    (None, "pool"),
    (instant, "created_at"),
)
LIVE_RUNS = Rows(
    (None, "id org_id definition_id revision handler"),
    (_list, "variant_handlers"),
    (None, "isolation origin"),
    (instant, "scheduled_for"),
    (None, "idempotency_key"),
    (json_text, "params"),
    (None, "backfill_id max_concurrent priority serial"),
    (instant, "available_at start_by"),
    (None, "pool"),
)
NEXT_FIRES = Rows((instant, "next_scheduled_for next_fire_at"), (None, "definition_id"))
GROWN_SKIPS = Rows((instant, "skip.skipped_until"), (None, "skip.count id"))
NEW_SKIPS = Rows(
    (None, "org_id definition_id revision"), (instant, "skipped_from skipped_until"), (None, "count reason")
)


def fire_first(connection: Connection) -> tuple[datetime, datetime | None]:
    (first,) = driver(connection).cursor().execute(FIRST).fetchone()
    return file_now(connection), None if first is None else from_text(first)


def fire_lock(connection: Connection, *, limit: int, specs: Specs) -> tuple[datetime, list[DueDefinition]]:
    cursor = driver(connection).cursor()
    now = file_now(connection)
    oldest, newest = shares(limit)
    rows = cursor.execute(OLDEST, (instant(now), oldest)).fetchall()
    if len(rows) == oldest and newest:
        taken = {definition_id for definition_id, *_ in rows}
        last = cursor.execute(NEWEST, (instant(now), newest)).fetchall()
        rows += [row for row in last if row[0] not in taken]
    due = []
    for definition_id, org_id, code, timezone, name, revision, scheduled_for, pool in rows:
        spec = specs.get((definition_id, revision))
        if spec is None:
            (text,) = cursor.execute(SPEC, (definition_id, revision)).fetchone()
            spec = specs[definition_id, revision] = shared_spec(text)
        at = from_text(scheduled_for)
        due.append(DueDefinition(definition_id, org_id, code, timezone, name, revision, at, spec, pool))
    return now, due


def fire_write(connection: Connection, runs: Sequence[NewRun], next_fires: Sequence[NextFire]) -> Fired:
    cursor = driver(connection).cursor()
    now = file_now(connection)
    inserted, overlapped = _insert(cursor, runs, now)
    cursor.executemany(NEXT, NEXT_FIRES.of(next_fires))
    _, first = fire_first(connection)
    return Fired(inserted, overlapped, next_fire_at=first, now=now)


def _insert(cursor: Any, runs: Sequence[NewRun], now: datetime) -> tuple[list[NewRun], list[NewRun]]:
    if not runs:
        return [], []
    at = instant(now)
    cursor.executemany(RUN, [(*row, at) for row in RUNS.of(runs)])
    made = cursor.rowcount
    if made == len(runs):
        new = list(runs)
    else:
        known = {id_ for id_, _ in cursor.execute(INSERTED, (json_list(run.id for run in runs),))}
        new = [run for run in runs if run.id in known]
    cursor.executemany(LIVE, LIVE_RUNS.of(new))
    if cursor.rowcount == len(new):
        return new, []
    live = {id_ for id_, is_live in cursor.execute(INSERTED, (json_list(run.id for run in new),)) if is_live}
    overlapped = [run for run in new if run.id not in live]
    cursor.executemany(UNDO, [(run.id,) for run in overlapped])
    return [run for run in new if run.id in live], overlapped


def fire_skips(connection: Connection, skips: Sequence[NewSkip]) -> None:
    cursor = driver(connection).cursor()
    last: dict[DefinitionId, StoredSkip] = {}
    for definition_id in {skip.definition_id for skip in skips}:
        row = cursor.execute(LAST_SKIP, (definition_id,)).fetchone()
        if row is not None:
            id_, org_id, revision, since, until, count, reason = row
            last[definition_id] = StoredSkip(
                id_,
                NewSkip(org_id, definition_id, revision, from_text(since), from_text(until), count, reason),
            )
    ran_before = {}
    for skip in skips:
        (ran_at,) = cursor.execute(RAN_BEFORE, (skip.definition_id, instant(skip.skipped_from))).fetchone()
        ran_before[skip.definition_id, skip.skipped_from] = None if ran_at is None else from_text(ran_at)
    grown, new = fold(skips, last, ran_before)
    cursor.executemany(GROW, GROWN_SKIPS.of(grown))
    cursor.executemany(SKIP, [(new_id(), *row) for row in NEW_SKIPS.of(new)])
