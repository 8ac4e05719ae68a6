"""Lines: of each org its waiting runs, read as far as the free slots reach, and the best of all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.ids import OrgId
from worker.runs.run import Isolation
from worker.store.sql.level import Line, reach
from worker.store.sql.sqlite.values import in_one_answer, json_list

# A waiting run, as `LINES` gives its columns.
Candidate = Sequence[Any]
# Its rank, since when it is due, its id; then itself.
_Ranked = tuple[float, str, str, Candidate]

ID, _DEFINITION, _HANDLER, _ISOLATION, _AVAILABLE_AT, _MOST = 0, 2, 4, 5, 8, 16

# The same portion of the line of each org. `{names}` stands for as many parameters as there are handlers.
# What is JSON already is put together as text: `json_group_array(json(line))` would read it once more.
LINES = """
SELECT '[' || COALESCE(group_concat(line), '') || ']' FROM (
  SELECT (
    SELECT json_group_array(json_array(
      c.id, c.org_id, c.definition_id, c.revision, c.handler, c.isolation, c.origin, c.scheduled_for,
      c.available_at, c.start_by, c.attempt, c.failures, c.recoveries, c.fencing_token,
      c.idempotency_key, c.params, c.max_concurrent))
    FROM (
      SELECT * FROM live_runs l INDEXED BY ix_live_runs_waiting
      WHERE l.org_id = e.value AND l.state = 'waiting' AND l.available_at <= ? AND l.isolation IN (?, ?)
        AND l.handler IN ({names})
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


class Limits:
    """What may still start in this transaction: by isolation, by handler, by definition."""

    def __init__(
        self,
        cursor: Any,
        offered: Mapping[str, int | None],
        running: Mapping[str, int],
        free: Mapping[Isolation, int],
    ) -> None:
        self._cursor = cursor
        self._free: dict[str, int] = {isolation: slots for isolation, slots in free.items() if slots > 0}
        self._handlers = {name: limit - running[name] for name, limit in offered.items() if limit is not None}
        self._definitions: dict[str, int] = {}
        self.handlers = [name for name in offered if self._handlers.get(name, 1) > 0]
        self.free = sum(self._free.values())
        self.isolations = (
            "child" if "child" in self._free else None,
            "inline" if "inline" in self._free else None,
        )

    def take(self, run: Candidate) -> bool:
        """Count the run against every limit, if all allow it."""
        handler, isolation, most = run[_HANDLER], run[_ISOLATION], run[_MOST]
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
    """An org's line, how many of it may start, and where what was not read yet begins."""

    org_id: OrgId
    line: Line
    most: int
    portion: int
    offset: int = 0

    def ranked(self, runs: Sequence[Candidate]) -> list[_Ranked]:
        """The next portion, read just now, with the rank of each."""
        places = range(self.offset + 1, self.most + 1)
        self.offset = self.offset + len(runs) if len(runs) == self.portion else self.most
        rank = self.line.rank
        return [
            (rank(place), run[_AVAILABLE_AT], run[ID], run) for place, run in zip(places, runs, strict=False)
        ]

    @property
    def next_rank(self) -> float:
        """The rank of the first that was not read."""
        return self.line.rank(self.offset + 1) if self.offset < self.most else math.inf


class Lines:
    """Reads lines in portions: at first as far as the free slots reach if all are long."""

    def __init__(self, cursor: Any, limits: Limits, offered: Iterable[str], now: str) -> None:
        self._cursor = cursor
        self._statement = _with_names(len(limits.handlers))
        self._values = (now, *limits.isolations, *limits.handlers, json_list(offered))

    def begin(self, lines: Sequence[tuple[OrgId, Line]], free: int) -> tuple[list[_Queue], list[_Ranked]]:
        """The lines that may start something, and the first portion of each."""
        portions: dict[int, list[_Queue]] = {}
        reaches = reach([line for _, line in lines], free)
        for (org_id, line), places in zip(lines, reaches, strict=True):
            if line.room > 0:
                # Few lengths, so that the lines of many orgs are read at once.
                portion = 1 << max(0, places - 1).bit_length()
                queue = _Queue(org_id, line, min(line.room, free), portion)
                portions.setdefault(portion, []).append(queue)
        ranked: list[_Ranked] = []
        for portion, queues in portions.items():
            read = self._read([queue.org_id for queue in queues], portion, 0)
            for queue, runs in zip(queues, read, strict=True):
                ranked += queue.ranked(runs)
        return [queue for queues in portions.values() for queue in queues], ranked

    def go_on(self, queue: _Queue) -> list[_Ranked]:
        """The next portion of a line, twice as long as the last."""
        queue.portion *= 2
        (runs,) = self._read([queue.org_id], queue.portion, queue.offset)
        return queue.ranked(runs)

    def _read(self, orgs: Sequence[OrgId], portion: int, offset: int) -> list[list[Candidate]]:
        values = (*self._values, portion, offset, json_list(orgs))
        read: list[list[Candidate]] = in_one_answer(self._cursor, self._statement, values)
        return read


@functools.cache
def _with_names(handlers: int) -> str:
    return LINES.format(names=", ".join("?" * handlers))


def best(lines: Lines, counted: Sequence[tuple[OrgId, Line]], limits: Limits) -> list[Candidate]:
    """The runs to start, best first: the least (running of its org + its place in its line) / weight."""
    queues, ranked = lines.begin(counted, limits.free)
    picked: list[Candidate] = []
    while limits.free > 0:
        ranked.sort()
        # What was not read may come before what was: it is read then.
        bound = min((queue.next_rank for queue in queues), default=math.inf)
        looked_at = 0
        for rank, _, _, run in ranked:
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
                ranked += lines.go_on(queue)
    return picked
