"""Admit: waiting runs become running ones, fair over held slots and within every limit."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text, to_text
from worker.ids import OrgId, RunId, WorkerId
from worker.runs.run import AdmittedRun, Isolation
from worker.store.connection import driver, file_now
from worker.store.sql import RingStep
from worker.store.sql.sqlite.values import json_list, json_value

# id, available_at, handler, isolation, definition_id, max_concurrent
_Candidate = tuple[RunId, str, str, Isolation, str, int | None]

RING = """
WITH RECURSIVE hop(org_id, n) AS (
  SELECT (SELECT org_id FROM live_runs WHERE state = 'waiting' AND org_id > ? ORDER BY org_id LIMIT 1), 1
  UNION ALL
  SELECT (SELECT l.org_id FROM live_runs l
          WHERE l.state = 'waiting' AND l.org_id > hop.org_id ORDER BY l.org_id LIMIT 1), hop.n + 1
  FROM hop WHERE hop.org_id IS NOT NULL AND hop.n < ?
)
SELECT org_id FROM hop WHERE org_id IS NOT NULL
"""

ORGS = """
SELECT o.id, o.weight, o.max_concurrent_runs,
       (SELECT count(*) FROM live_runs l WHERE l.org_id = o.id AND l.state = 'running')
FROM json_each(?) e CROSS JOIN orgs o ON o.id = e.value AND o.state = 'active'
"""

# `{names}` stands for as many parameters as there are handlers.
LINE = """
SELECT l.id, l.available_at, l.handler, l.isolation, l.definition_id, l.max_concurrent
FROM live_runs l INDEXED BY ix_live_runs_waiting
WHERE l.org_id = ? AND l.state = 'waiting' AND l.available_at <= ? AND l.isolation IN (?, ?)
  AND l.handler IN ({names})
  AND (l.variant_handlers IS NULL OR NOT EXISTS (
       SELECT 1 FROM json_each(l.variant_handlers) v
       WHERE v.value NOT IN (SELECT value FROM json_each(?))))
  AND (l.max_concurrent IS NULL OR l.max_concurrent > (
       SELECT count(*) FROM live_runs d WHERE d.definition_id = l.definition_id AND d.started_at IS NOT NULL))
ORDER BY l.priority DESC, l.available_at, l.id LIMIT ? OFFSET ?
"""

RUNNING_OF_HANDLER = "SELECT count(*) FROM live_runs WHERE handler = ? AND reason IS NULL"
RUNNING_OF_DEFINITION = "SELECT count(*) FROM live_runs WHERE definition_id = ? AND started_at IS NOT NULL"
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
    free: Mapping[Isolation, int],
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
    return RingStep(
        dict.fromkeys(orgs, sum(free.values())),
        partial=False,
        cursor=orgs[-1] if orgs else cursor,
        hops=len(orgs),
        complete=complete,
    )


def admit_choose(
    connection: Connection,
    worker_id: WorkerId,
    orgs: Mapping[OrgId, int],
    *,
    offered: Mapping[str, int | None],
    free: Mapping[Isolation, int],
) -> list[AdmittedRun]:
    cursor = driver(connection).cursor()
    if cursor.execute(REGISTERED, (worker_id,)).fetchone() is None:
        return []
    now = file_now(connection)
    limits = _Limits(cursor, offered, free)
    picked = _best(cursor, list(orgs), limits, list(offered), to_text(now))
    if not picked:
        return []
    rows = {row[0]: row for row in cursor.execute(PICKED, (json_list(picked),))}
    cursor.executemany(ADMIT, [(worker_id, to_text(now), run_id) for run_id in picked])
    return [_admitted(rows[run_id], now) for run_id in picked]


class _Limits:
    """What may still start in this transaction: by isolation, by handler, by definition."""

    def __init__(self, cursor: Any, offered: Mapping[str, int | None], free: Mapping[Isolation, int]) -> None:
        self._cursor = cursor
        self._free = {isolation: slots for isolation, slots in free.items() if slots > 0}
        self._handlers = {
            name: limit - self._count(RUNNING_OF_HANDLER, name)
            for name, limit in offered.items()
            if limit is not None
        }
        self._definitions: dict[str, int] = {}
        self.handlers = [name for name in offered if self._handlers.get(name, 1) > 0]
        self.free = sum(self._free.values())
        self.isolations = (
            "child" if "child" in self._free else None,
            "inline" if "inline" in self._free else None,
        )

    def take(self, run: _Candidate) -> bool:
        """Count the run against every limit, if all allow it."""
        _, _, handler, isolation, definition_id, max_concurrent = run
        if self._free.get(isolation, 0) <= 0 or self._handlers.get(handler, 1) <= 0:
            return False
        if max_concurrent is not None:
            running = self._definitions.get(definition_id)
            if running is None:
                running = self._count(RUNNING_OF_DEFINITION, definition_id)
            if running >= max_concurrent:
                return False
            self._definitions[definition_id] = running + 1
        self._free[isolation] -= 1
        self.free -= 1
        if handler in self._handlers:
            self._handlers[handler] -= 1
        return True

    def _count(self, statement: str, value: str) -> int:
        (count,) = self._cursor.execute(statement, (value,)).fetchone()
        return int(count)


def _best(
    cursor: Any, orgs: Sequence[OrgId], limits: _Limits, offered: Sequence[str], now: str
) -> list[RunId]:
    """The runs to start, best first: the least (running of its org + its place in line) / weight."""
    if not limits.handlers:
        return []
    portion, all_offered = max(2, 2 * limits.free // len(orgs)), json_list(offered)
    heap: list[tuple[float, str, RunId, _Candidate, int, int, Iterator[_Candidate]]] = []
    for org_id, weight, most, running in cursor.execute(ORGS, (json_list(orgs),)).fetchall():
        values = (org_id, now, *limits.isolations, *limits.handlers, all_offered)
        length = max(0, min(most - running, limits.free))
        line: Iterator[_Candidate] = itertools.islice(_line(cursor, values, portion), length)
        for run in line:
            heap.append(((running + 1) / weight, run[1], run[0], run, running + 1, weight, line))
            break
    heapq.heapify(heap)
    picked: list[RunId] = []
    while heap and limits.free > 0:
        _, _, _, run, place, weight, line = heap[0]
        if limits.take(run):
            picked.append(run[0])
        behind = next(line, None)
        if behind is None:
            heapq.heappop(heap)
        else:
            rank = (place + 1) / weight
            heapq.heapreplace(heap, (rank, behind[1], behind[0], behind, place + 1, weight, line))
    return picked


def _line(cursor: Any, values: tuple[Any, ...], portion: int) -> Iterator[_Candidate]:
    """An org's waiting runs in their order, read in portions as they are asked for."""
    statement = _line_statement(len(values) - 5)
    offset = 0
    while True:
        rows = cursor.execute(statement, (*values, portion, offset)).fetchall()
        yield from rows
        if len(rows) < portion:
            return
        offset += portion


@functools.cache
def _line_statement(handlers: int) -> str:
    return LINE.format(names=", ".join("?" * handlers))


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
