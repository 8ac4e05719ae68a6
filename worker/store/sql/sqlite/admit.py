"""Admit: waiting runs become running ones, fair over held slots and within every limit."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text
from worker.ids import DefinitionId, OrgId, RunId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.connection import driver, file_now
from worker.store.sql import RingStep
from worker.store.sql.sqlite.values import instant, json_list, json_value

RING = """
WITH RECURSIVE hop(org_id, n) AS (
  SELECT (SELECT org_id FROM live_runs WHERE state = 'waiting' AND org_id > ?1 ORDER BY org_id LIMIT 1), 1
  UNION ALL
  SELECT (SELECT l.org_id FROM live_runs l
          WHERE l.state = 'waiting' AND l.org_id > hop.org_id ORDER BY l.org_id LIMIT 1), hop.n + 1
  FROM hop WHERE hop.org_id IS NOT NULL AND hop.n < ?2
)
SELECT org_id FROM hop WHERE org_id IS NOT NULL
"""

ORG = """
SELECT weight, max_concurrent_runs,
       (SELECT count(*) FROM live_runs l WHERE l.org_id = orgs.id AND l.state = 'running')
FROM orgs WHERE id = ? AND state = 'active'
"""

LINE = """
SELECT l.id, l.definition_id, l.handler, l.isolation, l.max_concurrent, l.available_at
FROM live_runs l INDEXED BY ix_live_runs_waiting
WHERE l.org_id = ?1 AND l.state = 'waiting' AND l.available_at <= ?2
  AND l.handler IN (SELECT value FROM json_each(?3))
  AND (l.variant_handlers IS NULL OR NOT EXISTS (
       SELECT 1 FROM json_each(l.variant_handlers) v
       WHERE v.value NOT IN (SELECT value FROM json_each(?3))))
  AND (l.max_concurrent IS NULL OR l.max_concurrent > (
       SELECT count(*) FROM live_runs d WHERE d.definition_id = l.definition_id AND d.state = 'running'))
ORDER BY l.priority DESC, l.available_at, l.id LIMIT ?4 OFFSET ?5
"""

RUNNING_OF_HANDLER = "SELECT count(*) FROM live_runs WHERE handler = ? AND state = 'running'"
RUNNING_OF_DEFINITION = "SELECT count(*) FROM live_runs WHERE definition_id = ? AND state = 'running'"
REGISTERED = "SELECT 1 FROM workers WHERE id = ? AND ended_at IS NULL"

PICKED = """
SELECT l.id, l.org_id, l.definition_id, l.revision, l.handler, l.isolation, l.origin, l.scheduled_for,
       l.available_at, l.start_by, l.attempt, l.failures, l.recoveries, l.fencing_token,
       l.idempotency_key, l.params
FROM json_each(?) e CROSS JOIN live_runs l ON l.id = e.value
"""

ADMIT = """
UPDATE live_runs SET state = 'running', reason = NULL, detail = NULL, worker_id = ?, started_at = ?,
                     attempt = attempt + 1, fencing_token = fencing_token + 1
WHERE id = ? AND state = 'waiting'
"""


def admit_ring(
    connection: Connection,
    cursor: OrgId,
    *,
    want: int,
    hops: int,
    handlers: Sequence[str],
    isolations: Sequence[Isolation],
) -> RingStep:
    # What the orgs found can start is looked at when they are chosen from: here a hop
    # costs less than a second look, and there is no other admitter to be kept waiting.
    rows = driver(connection).cursor()
    most = min(want, hops)
    orgs = [org_id for (org_id,) in rows.execute(RING, (cursor, most))]
    complete = False
    if len(orgs) < most:
        round_ = rows.execute(RING, ("", most - len(orgs))).fetchall()
        before = [org_id for (org_id,) in round_ if org_id <= cursor]
        complete = len(before) < len(round_) or len(orgs) + len(before) < most
        orgs += before
    return RingStep(orgs, orgs[-1] if orgs else cursor, len(orgs), complete)


def admit_choose(
    connection: Connection,
    worker_id: WorkerId,
    orgs: Sequence[OrgId],
    *,
    offered: Mapping[str, int | None],
    free: Mapping[Isolation, int],
) -> list[AdmittedRun]:
    cursor = driver(connection).cursor()
    if cursor.execute(REGISTERED, (worker_id,)).fetchone() is None:
        return []
    now = file_now(connection)
    limits = _Limits(cursor, offered, free)
    picked = list(_ranked(cursor, orgs, limits, now))
    if not picked:
        return []
    order = {run_id: place for place, run_id in enumerate(picked)}
    rows = cursor.execute(PICKED, (json_list(picked),)).fetchall()
    started_at = instant(now)
    cursor.executemany(ADMIT, [(worker_id, started_at, run_id) for run_id in sorted(picked)])
    return sorted((_admitted(row, now) for row in rows), key=lambda run: order[run.id])


@dataclass(slots=True)
class _Candidate:
    id: RunId
    definition_id: DefinitionId
    handler: str
    isolation: Isolation
    max_concurrent: int | None
    available_at: str


class _Limits:
    """What may still start in this transaction: by isolation, by handler, by definition."""

    def __init__(
        self, cursor: Any, offered: Mapping[str, int | None], free: Mapping[Isolation, int]
    ) -> None:
        self._cursor = cursor
        self._free = Counter(free)
        self._handlers = {
            name: limit - self._count(RUNNING_OF_HANDLER, name)
            for name, limit in offered.items()
            if limit is not None
        }
        self._definitions: dict[DefinitionId, int] = {}
        self.handlers = [name for name in offered if self._handlers.get(name, 1) > 0]

    @property
    def free(self) -> int:
        return sum(count for count in self._free.values() if count > 0)

    def take(self, run: _Candidate) -> bool:
        """Count the run against every limit, if all allow it."""
        if self._free[run.isolation] <= 0 or self._handlers.get(run.handler, 1) <= 0:
            return False
        if run.max_concurrent is not None:
            running = self._definitions.get(run.definition_id)
            if running is None:
                running = self._count(RUNNING_OF_DEFINITION, run.definition_id)
            if running >= run.max_concurrent:
                return False
            self._definitions[run.definition_id] = running + 1
        self._free[run.isolation] -= 1
        if run.handler in self._handlers:
            self._handlers[run.handler] -= 1
        return True

    def _count(self, statement: str, value: str) -> int:
        (count,) = self._cursor.execute(statement, (value,)).fetchone()
        return int(count)


def _ranked(cursor: Any, orgs: Sequence[OrgId], limits: _Limits, now: datetime) -> Iterator[RunId]:
    """The runs to start, best first: the least (running of its org + its place in line) / weight."""
    portion = max(4, 2 * limits.free // max(1, len(orgs)))
    heap: list[tuple[float, str, RunId, _Candidate, int, int, int, Iterator[_Candidate]]] = []
    for org_id in orgs:
        row = cursor.execute(ORG, (org_id,)).fetchone()
        if row is None or row[2] >= row[1]:
            continue
        weight, most, running = row
        line = _line(cursor, org_id, limits.handlers, instant(now), portion)
        first = next(line, None)
        if first is not None:
            rank = (running + 1) / weight
            heap.append((rank, first.available_at, first.id, first, running, most, weight, line))
    heapq.heapify(heap)
    while heap and limits.free > 0:
        _, _, _, run, running, most, weight, line = heapq.heappop(heap)
        if limits.take(run):
            yield run.id
            running += 1
        following = next(line, None) if running < most else None
        if following is not None:
            rank = (running + 1) / weight
            heapq.heappush(
                heap,
                (rank, following.available_at, following.id, following, running, most, weight, line),
            )


def _line(
    cursor: Any, org_id: OrgId, handlers: Sequence[str], now: str | None, portion: int
) -> Iterator[_Candidate]:
    names, offset = json_list(handlers), 0
    while True:
        rows = cursor.execute(LINE, (org_id, now, names, portion, offset)).fetchall()
        for row in rows:
            yield _Candidate(*row)
        if len(rows) < portion:
            return
        offset += portion


def _admitted(row: tuple[Any, ...], now: datetime) -> AdmittedRun:
    (
        id_,
        org_id,
        definition_id,
        revision,
        handler,
        isolation,
        origin,
        scheduled_for,
        available_at,
        start_by,
        attempt,
        failures,
        recoveries,
        fencing_token,
        idempotency_key,
        params,
    ) = row
    return AdmittedRun(
        id_,
        org_id,
        definition_id,
        revision,
        handler,
        isolation,
        origin,
        from_text(scheduled_for),
        from_text(available_at),
        None if start_by is None else from_text(start_by),
        now,
        attempt + 1,
        failures,
        recoveries,
        fencing_token + 1,
        idempotency_key,
        json_value(params),
    )
