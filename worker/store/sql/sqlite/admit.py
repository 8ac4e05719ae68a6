"""Admit: waiting runs become running, in order of fair share and within every limit."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text, to_text
from worker.ids import OrgId
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store.dialect import driver, file_now
from worker.store.sql.contract import PER_ORG, WINDOW, OrgQueue, RingStep, Taker, Walk, distinct, reach
from worker.store.sql.sqlite.values import in_one_answer, in_one_step, json_list, json_value

Free = Mapping[Isolation, int]
# A waiting run: the columns of `QUEUES`.
Candidate = Sequence[Any]
# Rank, whether others of that rank go first, due time, id, run.
_Ranked = tuple[float, bool, str, str, Candidate]

ID = 0
_DEFINITION = 2
_HANDLER = 4
_ISOLATION = 5
_AVAILABLE_AT = 8
_MAX_CONCURRENT = 16
_POOL = 17
_PARENT = 18

# The same portion of each org's queue. `{names}` and `{pools}` become one parameter for each.
# JSON is joined as text: `json_group_array(json(line))` would parse it again.
QUEUES = """
SELECT '[' || COALESCE(group_concat(line), '') || ']' FROM (
  SELECT (
    SELECT json_group_array(json_array(
      c.id, c.org_id, c.definition_id, c.revision, c.handler, c.isolation, c.origin, c.scheduled_for,
      c.available_at, c.start_by, c.attempt, c.failures, c.recoveries, c.fencing_token,
      c.idempotency_key, c.params, c.max_concurrent, c.pool, c.parent_id))
    FROM (
      SELECT * FROM live_runs l INDEXED BY ix_live_runs_waiting
      WHERE l.org_id = e.value AND l.state = 'waiting' AND l.available_at <= ? AND l.isolation IN (?, ?)
        AND l.handler IN ({names}) AND l.pool IN ({pools})
        AND (l.variant_handlers IS NULL OR NOT EXISTS (
             SELECT 1 FROM json_each(l.variant_handlers) v
             WHERE v.value NOT IN (SELECT value FROM json_each(?))))
        AND (l.max_concurrent IS NULL OR l.max_concurrent > (
             SELECT count(*) FROM live_runs d
             WHERE d.definition_id = l.definition_id AND d.started_at IS NOT NULL))
      ORDER BY l.priority DESC, l.available_at, l.id LIMIT ? OFFSET ?) c) AS line
  FROM json_each(?) e)
"""

RUNNING_OF_DEFINITION = "SELECT count(*) FROM live_runs WHERE definition_id = ? AND started_at IS NOT NULL"


class RoomLeft:
    """How many more runs may start in this transaction: by isolation, handler and definition."""

    def __init__(self, cursor: Any, taker: Taker, running: Mapping[str, int], free: Free) -> None:
        self._cursor, offered = cursor, taker.offered
        self._free: dict[str, int] = {isolation: slots for isolation, slots in free.items() if slots > 0}
        self._handlers = {name: limit - running[name] for name, limit in offered.items() if limit is not None}
        self._definitions: dict[str, int] = {}
        self.handlers = [name for name in offered if self._handlers.get(name, 1) > 0]
        self.free = sum(self._free.values())
        self.isolations = [kind if kind in self._free else None for kind in ("child", "inline")]

    def take(self, run: Candidate) -> bool:
        """Count the run against every limit; False if one is reached."""
        handler, isolation, most = run[_HANDLER], run[_ISOLATION], run[_MAX_CONCURRENT]
        if self._free.get(isolation, 0) <= 0 or self._handlers.get(handler, 1) <= 0:
            return False
        if most is not None:
            definition_id = run[_DEFINITION]
            running = self._definitions.get(definition_id)
            if running is None:
                (running,) = self._cursor.execute(RUNNING_OF_DEFINITION, (definition_id,)).fetchone()
            if running >= most:
                return False
            self._definitions[definition_id] = running + 1
        self._free[isolation] -= 1
        self.free -= 1
        if handler in self._handlers:
            self._handlers[handler] -= 1
        return True


@dataclass(slots=True)
class _Queue:
    """An org's queue, the limit of its starts, and the offset of the first run not read yet."""

    org_id: OrgId
    counts: OrgQueue
    most: int
    portion: int
    later: bool
    offset: int = 0

    def ranked(self, runs: Sequence[Candidate]) -> list[_Ranked]:
        """The portion read last, with the rank of each run."""
        places = range(self.offset + 1, self.most + 1)
        self.offset = self.offset + len(runs) if len(runs) == self.portion else self.most
        rank, later = self.counts.rank, self.later
        return [
            (rank(place), later, run[_AVAILABLE_AT], run[ID], run)
            for place, run in zip(places, runs, strict=False)
        ]

    @property
    def next_rank(self) -> float:
        """The rank of the first run not read yet."""
        return self.counts.rank(self.offset + 1) if self.offset < self.most else math.inf


class QueueReader:
    """Reads queues in portions: first as many runs as the free slots reach if all queues are long."""

    def __init__(self, cursor: Any, limits: RoomLeft, taker: Taker, now: str) -> None:
        self._cursor = cursor
        self._statement = _with_names(len(limits.handlers), len(taker.pools))
        runnable = (*limits.isolations, *limits.handlers, *taker.pools)
        self._values = (now, *runnable, json_list(taker.offered))

    def begin(
        self, counted: Sequence[tuple[OrgId, OrgQueue]], free: int, first: Collection[OrgId]
    ) -> tuple[list[_Queue], list[_Ranked]]:
        """The queues that may start runs, and the first portion of each; see `admit_choose` for `first`."""
        portions: dict[int, list[_Queue]] = {}
        reaches = reach([counts for _, counts in counted], free)
        for (org_id, counts), places in zip(counted, reaches, strict=True):
            if counts.room > 0:
                # Few different lengths, so that one query reads the queues of many orgs.
                portion = 1 << max(0, places - 1).bit_length()
                queue = _Queue(org_id, counts, min(counts.room, free), portion, org_id not in first)
                portions.setdefault(portion, []).append(queue)
        ranked: list[_Ranked] = []
        for portion, queues in portions.items():
            read = self._read([queue.org_id for queue in queues], portion, 0)
            for queue, runs in zip(queues, read, strict=True):
                ranked += queue.ranked(runs)
        return [queue for queues in portions.values() for queue in queues], ranked

    def go_on(self, queue: _Queue) -> list[_Ranked]:
        """The next portion of a queue, twice as long as the last."""
        queue.portion *= 2
        (runs,) = self._read([queue.org_id], queue.portion, queue.offset)
        return queue.ranked(runs)

    def _read(self, orgs: Sequence[OrgId], portion: int, offset: int) -> list[list[Candidate]]:
        values = (*self._values, portion, offset, json_list(orgs))
        read: list[list[Candidate]] = in_one_answer(self._cursor, self._statement, values)
        return read


@functools.cache
def _with_names(handlers: int, pools: int) -> str:
    return QUEUES.format(names=", ".join("?" * handlers), pools=", ".join("?" * pools))


def best(
    reader: QueueReader,
    counted: Sequence[tuple[OrgId, OrgQueue]],
    limits: RoomLeft,
    first: Collection[OrgId] = (),
) -> list[Candidate]:
    """The runs to start, in order of (running runs of the org + place in its queue) / weight."""
    queues, ranked = reader.begin(counted, limits.free, first)
    picked: list[Candidate] = []
    while limits.free > 0:
        ranked.sort()
        # A run not read yet may rank before this: stop there and read on.
        bound = min((queue.next_rank for queue in queues), default=math.inf)
        looked_at = 0
        for rank, _, _, _, run in ranked:
            if rank >= bound or limits.free <= 0:
                break
            looked_at += 1
            if limits.take(run):
                picked.append(run)
        if bound == math.inf or limits.free <= 0:
            break
        del ranked[:looked_at]
        for queue in queues:
            if queue.next_rank <= bound:
                ranked += reader.go_on(queue)
    return picked


# Each of these returns one row, whatever it finds: see `values`.
RING = """
WITH RECURSIVE hop(org_id, n) AS (
  SELECT (SELECT org_id FROM live_runs WHERE state = 'waiting' AND org_id > ? ORDER BY org_id LIMIT 1), 1
  UNION ALL
  SELECT (SELECT l.org_id FROM live_runs l
          WHERE l.state = 'waiting' AND l.org_id > hop.org_id ORDER BY l.org_id LIMIT 1), hop.n + 1
  FROM hop WHERE hop.org_id IS NOT NULL AND hop.n < ?
)
SELECT json_group_array(org_id) FROM hop WHERE org_id IS NOT NULL
"""

# Ids of runs begin with the time at which they were due: see `ids.new_id_at`.
NEWEST = """
SELECT json_group_array(org_id) FROM (
  SELECT org_id FROM (SELECT org_id, state, available_at, handler, isolation, pool FROM live_runs
                      ORDER BY id DESC LIMIT ?)
  WHERE state = 'waiting' AND available_at <= ? AND isolation IN (SELECT value FROM json_each(?))
    AND handler IN (SELECT value FROM json_each(?)) AND pool IN (SELECT value FROM json_each(?))
  LIMIT ?)
"""

COUNTS = """
SELECT EXISTS (SELECT 1 FROM workers
               WHERE id = ? AND ended_at IS NULL AND (host_id IS NULL OR lease_until > ?)),
       (SELECT json_group_object(h.value, (SELECT count(*) FROM live_runs l
                                           WHERE l.state = 'running' AND l.handler = h.value)
                                        + (SELECT count(*) FROM live_runs l
                                           WHERE l.state = 'parked' AND l.started_at IS NOT NULL
                                             AND l.handler = h.value))
        FROM json_each(?) h),
       (SELECT json_group_array(json_array(o.id, (SELECT count(*) FROM live_runs l
                                                  WHERE l.org_id = o.id AND l.state = 'running'),
                                           o.max_concurrent_runs, o.weight))
        FROM json_each(?) e CROSS JOIN orgs o ON o.id = e.value AND o.state = 'active')
"""

ADMIT = """
UPDATE live_runs SET state = 'running', reason = NULL, detail = NULL, worker_id = ?, started_at = ?,
                     attempt = attempt + 1, fencing_token = fencing_token + 1
WHERE id IN {rows} AND state = 'waiting'
"""


# What a worker counts that only places runs: the slots of the pool's hosts, and what takes them.
ROOM = """
SELECT COALESCE(sum(json_extract(w.capacity, '$.children')), 0),
       COALESCE(sum(json_extract(w.capacity, '$.inline')), 0)
FROM workers w
WHERE EXISTS (SELECT 1 FROM json_each(w.pools) p JOIN json_each(?) e ON e.value = p.value)
  AND w.host_id IS NOT NULL AND w.ended_at IS NULL AND w.lease_until > ?
"""
OF_POOL = """
SELECT l.isolation, count(*) FROM live_runs l
WHERE l.state = 'running' AND l.pool IN (SELECT value FROM json_each(?)) GROUP BY l.isolation
"""


def admit_ring(connection: Connection, taker: Taker, walk: Walk) -> RingStep:
    # Whether these orgs can start anything is checked in `admit_choose`: a hop costs less than a
    # second check, and no other admitter waits.
    rows = driver(connection).cursor()
    most, newest = min(walk.want, walk.hops), walk.newest
    orgs = in_one_answer(rows, RING, (walk.cursor, most))
    complete = False
    if len(orgs) < most:
        round_ = in_one_answer(rows, RING, ("", most - len(orgs)))
        before = [org_id for org_id in round_ if org_id <= walk.cursor]
        complete = len(before) < len(round_) or len(orgs) + len(before) < most
        orgs += before
    found: list[OrgId] = []
    if newest and not complete:
        isolations = json_list(isolation for isolation, slots in taker.free.items() if slots > 0)
        runnable = isolations, json_list(taker.offered), json_list(taker.pools)
        values = (WINDOW, to_text(file_now(connection)), *runnable, newest * PER_ORG)
        found = distinct(in_one_answer(rows, NEWEST, values), newest)
    return RingStep(
        dict.fromkeys(orgs, sum(taker.free.values())),
        partial=False,
        cursor=orgs[-1] if orgs else walk.cursor,
        hops=len(orgs),
        complete=complete,
        newest=found,
    )


def admit_choose(
    connection: Connection,
    taker: Taker,
    orgs: Mapping[OrgId, int],
    *,
    first: Collection[OrgId] = (),
    placing: bool = False,
) -> list[AdmittedRun]:
    cursor, now = driver(connection).cursor(), file_now(connection)
    free = _room(cursor, taker, to_text(now)) if placing else taker.free
    limited = [name for name, most in taker.offered.items() if most is not None]
    registered, of_handlers, of_orgs = cursor.execute(
        COUNTS, (taker.worker_id, to_text(now), json_list(limited), json_list(orgs))
    ).fetchone()
    if not registered:
        return []
    limits = RoomLeft(cursor, taker, json.loads(of_handlers), free)
    if not limits.handlers:
        return []
    reader = QueueReader(cursor, limits, taker, to_text(now))
    counted = [(org_id, OrgQueue(*counts)) for org_id, *counts in json.loads(of_orgs)]
    picked = best(reader, counted, limits, frozenset(first))
    in_one_step(cursor, ADMIT, [(run[ID],) for run in picked], first=(taker.worker_id, to_text(now)))
    return [_admitted(run, now) for run in picked]


def _room(cursor: Any, taker: Taker, now: str) -> Free:
    """At most the free slots of the pool's hosts."""
    pools = json_list(taker.pools)
    children, inline = cursor.execute(ROOM, (pools, now)).fetchone()
    running = dict(cursor.execute(OF_POOL, (pools,)).fetchall())
    slots: Free = {"child": children, "inline": inline}
    return {kind: max(0, min(most, slots[kind] - running.get(kind, 0))) for kind, most in taker.free.items()}


def admit_crowd(
    connection: Connection,
    taker: Taker,
    walk: Walk,
    *,
    passed: Collection[OrgId] = (),
    whole: bool = False,
) -> tuple[RingStep, list[AdmittedRun]]:
    step = admit_ring(connection, taker, walk)
    orgs = dict[OrgId, int].fromkeys((*step.newest, *passed), 1) | dict(step.orgs)
    admitted = admit_choose(connection, taker, orgs, first=step.newest)
    without = {run.org_id for run in admitted} | set(step.newest)
    in_turn = islice((org_id for org_id in orgs if org_id not in without), len(step.newest))
    return replace(step, orgs=dict.fromkeys(in_turn, 1)), admitted


def _admitted(run: Candidate, now: datetime) -> AdmittedRun:
    scheduled_for, available_at, start_by, attempt, failures, recoveries, fencing_token = run[7:14]
    idempotency_key, params = run[14:16]
    return AdmittedRun(
        *(
            *run[:7],
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
            run[_POOL],
            run[_PARENT],
        )
    )
