"""Starts: rows that a product's transaction has committed, until a worker makes their runs; on PostgreSQL.

Nothing here looks for ids above the last one: a start with a lower id may be committed later. Each row says
itself whether its run is made. Definitions are walked in a ring, so that many starts of one do not keep those
of others waiting. The lock of a definition keeps its starts in order, and other workers out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, delete, select

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.model.runs.run import NewRun
from worker.store import tables
from worker.store.bulk import among, insert_many
from worker.store.dialect import Row, database_now, driver
from worker.store.sql import run_words
from worker.store.sql.postgresql.arrays import uuids
from worker.store.sweeps import EndCounts

_starts, _live = tables.starts, tables.live_runs

# Rows whose time has come that one look lets be due.
WOKEN = 500
BEFORE_ALL = DefinitionId("00000000-0000-0000-0000-000000000000")

# The clock and the parameters are in subqueries, as in `sql.postgresql.fire`.
_WAKE = """
UPDATE starts SET state = 'due' WHERE id = ANY(ARRAY(
  SELECT id FROM starts WHERE state = 'later' AND not_before <= (SELECT clock_timestamp())
  ORDER BY not_before LIMIT (SELECT %s::integer) FOR UPDATE SKIP LOCKED))
"""
_IS_ANY_LATE = """
SELECT EXISTS (SELECT FROM starts WHERE state = 'later' AND not_before <= (SELECT clock_timestamp()))
"""
# From one definition with starts to the next, whatever the number of its starts.
_RING = """
WITH RECURSIVE ring(id, hops) AS (
  (SELECT definition_id, 1 FROM starts WHERE state = 'due' AND definition_id > (SELECT %s::uuid)
   ORDER BY definition_id LIMIT 1)
  UNION ALL
  SELECT n.id, hops + 1 FROM ring CROSS JOIN LATERAL (
    SELECT s.definition_id AS id FROM starts s WHERE s.state = 'due' AND s.definition_id > ring.id
    ORDER BY s.definition_id LIMIT 1) n
  WHERE hops < (SELECT %s::integer)
) SELECT id FROM ring
"""
# `definitions` alone: to lock its row of `schedule`, too, would keep firing out.
_LOCK = """
SELECT id FROM definitions WHERE id = ANY(%s::uuid[]) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
"""
# A later statement than the lock: its snapshot has all that the holder before has made.
_TAKE = """
SELECT s.* FROM unnest((SELECT %s::uuid[])) AS d(id) CROSS JOIN LATERAL (
  SELECT id, org_id, definition_id, key, login, created_at, not_before, params::text FROM starts
  WHERE state = 'due' AND definition_id = d.id ORDER BY id LIMIT (SELECT %s::integer)
  FOR UPDATE SKIP LOCKED) s
"""
_MADE = """
UPDATE starts SET state = 'made', made_at = clock_timestamp(), params = NULL
WHERE id = ANY((SELECT %s::uuid[])::uuid[])
"""
_REFUSED = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "created_by"),
    *("idempotency_key", "params", "pool", "created_at"),
)


class Start(NamedTuple):
    """A start whose run this transaction makes; `params` is JSON text, None if there are none."""

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    key: str
    login: str
    created_at: datetime
    not_before: datetime | None
    params: str | None

    @property
    def at(self) -> datetime:
        """The time that the run is for; its id begins with it."""
        return self.created_at if self.not_before is None else self.not_before


class RefusedStart(NamedTuple):
    """A run that ends as it is made, and why."""

    run: NewRun
    reason: str
    detail: str


def wake(connection: Connection) -> int:
    """Let starts be due whose `not_before` has come; returns how many, at most `WOKEN`."""
    woken: int = driver(connection).execute(_WAKE, (WOKEN,)).rowcount
    return woken


def due(connection: Connection, after: DefinitionId, limit: int) -> tuple[bool, list[DefinitionId]]:
    """Whether starts are to be woken, and the first definitions after this one with due starts; no lock."""
    raw = driver(connection)
    with raw.pipeline():
        late = raw.execute(_IS_ANY_LATE)
        ring = raw.execute(_RING, (after, limit))
        (is_late,) = late.fetchone()
        return is_late, [DefinitionId(id_) for (id_,) in ring.fetchall()]


def lock(
    connection: Connection, definition_ids: Sequence[DefinitionId], limit: int
) -> tuple[list[DefinitionId], list[Start]]:
    """Lock definitions, then their first due starts: `limit` in all, the same number of each.

    Definitions that another transaction has locked are left out.
    """
    raw = driver(connection)
    locked = [DefinitionId(id_) for (id_,) in raw.execute(_LOCK, (uuids(definition_ids),)).fetchall()]
    if not locked:
        return [], []
    each = max(1, limit // len(locked))
    rows = raw.execute(_TAKE, (uuids(locked), each)).fetchall()
    return locked, sorted((Start(*row) for row in rows), key=lambda start: start.id)


def mark_made(connection: Connection, ids: Sequence[RunId]) -> None:
    """Note that the runs of these starts are made: only their keys are left."""
    driver(connection).execute(_MADE, (uuids(ids),))


def blocking(connection: Connection, definition_ids: Iterable[DefinitionId]) -> Mapping[DefinitionId, Row]:
    """Of each of these definitions the unfinished run that keeps others out: id, state; a held one last."""
    query = select(_live.c.definition_id, _live.c.id, _live.c.state).where(_live.c.serial)
    query = query.where(among(connection, _live.c.definition_id, sorted(set(definition_ids))))
    rows = connection.execute(query.order_by(_live.c.state == "held", _live.c.id)).mappings()
    return {row["definition_id"]: dict(row) for row in rows}


def insert_refused(
    connection: Connection,
    refused: Sequence[RefusedStart],
    names: Mapping[DefinitionId, str],
    counts: EndCounts,
) -> None:
    """Insert runs that are refused, with the words by which a search finds them.

    Counts them together with `counts`, the runs that this transaction has ended before.
    """
    if not (refused or counts):
        return
    now = database_now(connection)
    for run, *_ in refused:
        counts.add(run.org_id, "refused")
    # First, and the runs by their definitions: an end locks the sums of orgs, then what last failed of each
    # definition, which a trigger writes.
    counts.write(connection, at=now)
    if not refused:
        return
    refused = sorted(refused, key=lambda start: (start.run.definition_id, start.run.id))
    ended = {"state": "refused", "available_at": now, "finished_at": now, "attempt": 0}
    insert_many(
        connection,
        tables.runs,
        [
            {
                **{name: getattr(run, name) for name in _REFUSED},
                **ended,
                "reason": reason,
                "detail": detail,
            }
            for run, reason, detail in refused
        ],
    )
    attempts = [
        EndedAttempt(
            *(run.id, run.org_id, run.definition_id, 0, 0, now, now, "refused", "refused", reason),
            trail=Trail(run.handler),
            detail=detail,
        )
        for run, reason, detail in refused
    ]
    words = run_words.words_of(attempts, names)
    columns = ("word", "run_id", "org_id", "shown")
    insert_many(connection, tables.run_words, [dict(zip(columns, word[:4], strict=True)) for word in words])


def forget(connection: Connection, age: timedelta, *, limit: int) -> int:
    """Delete the keys of runs that were made longer than `age` ago; returns how many."""
    old = (
        select(_starts.c.id)
        .where(_starts.c.state == "made", _starts.c.made_at < database_now(connection) - age)
        .order_by(_starts.c.made_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = connection.execute(old).scalars().all()
    if not ids:
        return 0
    return connection.execute(delete(_starts).where(among(connection, _starts.c.id, ids))).rowcount
