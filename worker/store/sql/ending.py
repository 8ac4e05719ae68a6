"""Pure parts of the hot statements: what ended attempts make of their runs, and queue depths."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import NamedTuple

from worker.ids import OrgId, RunId
from worker.runs.outcome import EndedAttempt


class OrgQueue(NamedTuple):
    """What ranks an org's waiting runs: how many of it run, how many may, and its weight."""

    running: int
    most: int
    weight: int

    @property
    def room(self) -> int:
        return self.most - self.running

    def rank(self, place: int) -> float:
        return (self.running + place) / self.weight


def reach(lines: Sequence[OrgQueue], free: int) -> list[int]:
    """For each line: how many of its runs are among the best `free`, were all lines long.

    Runs of one rank are counted in together. Where lines are short, some slots stay
    free, and the rest of the others must be looked at.
    """
    counts = [0] * len(lines)
    heap = [(line.rank(1), n) for n, line in enumerate(lines) if line.room > 0]
    heapq.heapify(heap)
    taken, level = 0, 0.0
    while heap and (taken < free or heap[0][0] <= level):
        level, n = heap[0]
        counts[n] += 1
        taken += 1
        if counts[n] < lines[n].room:
            heapq.heapreplace(heap, (lines[n].rank(counts[n] + 1), n))
        else:
            heapq.heappop(heap)
    return counts


# One of each for every run: to freeze them takes three times as long as to make them.
@dataclass(slots=True)
class LockedRun:
    """A running row of this worker, as it was locked."""

    fencing_token: int
    cancel_requested: bool
    cancel_reason: str | None


@dataclass(slots=True)
class Ending:
    """An attempt that is still ours to end, and where its run goes."""

    attempt: EndedAttempt
    state: str
    reason: str | None
    ended_at: datetime

    @property
    def final(self) -> bool:
        return self.state != "waiting"


@dataclass(frozen=True, slots=True)
class Rollups:
    """Sums in key order, so that two writers never wait for each other in a circle."""

    days: Sequence[tuple[date, OrgId, int, int, int]]
    hours: Sequence[tuple[datetime, OrgId, str, int]]


def settle(
    ended: Iterable[EndedAttempt], held: Mapping[RunId, LockedRun], now: datetime
) -> tuple[list[Ending], list[EndedAttempt]]:
    """Part what is still ours from what was fenced out, each in order of run ids.

    A run that would wait again although someone asked to cancel it is cancelled.
    """
    endings: dict[RunId, Ending] = {}
    fenced: list[EndedAttempt] = []
    for attempt in sorted(ended, key=lambda attempt: attempt.run_id):
        row = held.get(attempt.run_id)
        if row is None or row.fencing_token != attempt.fencing_token or attempt.run_id in endings:
            fenced.append(attempt)
            continue
        state, reason = attempt.state, attempt.reason
        if state == "waiting" and row.cancel_requested:
            state, reason = "cancelled", row.cancel_reason or "requested"
        # The worker's clock may differ from the database's: an attempt still ends within its row.
        ended_at = max(attempt.started_at, min(attempt.ended_at, now))
        endings[attempt.run_id] = Ending(attempt, state, reason, ended_at)
    return list(endings.values()), fenced


def sum_up(endings: Iterable[Ending], now: datetime) -> Rollups:
    """Runs, attempts and handler time by day and org; runs by hour, org and final state."""
    today = now.astimezone(UTC).date()
    hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    attempts: dict[OrgId, int] = {}
    seconds: dict[OrgId, float] = {}
    runs: dict[tuple[OrgId, str], int] = {}
    for ending in endings:
        attempt, state = ending.attempt, ending.state
        org_id, began_at = attempt.org_id, attempt.trail.handler_started_at
        attempts[org_id] = attempts.get(org_id, 0) + 1
        if began_at is not None and ending.ended_at > began_at:
            took = (ending.ended_at - began_at).total_seconds()
            seconds[org_id] = seconds.get(org_id, 0.0) + took
        if state != "waiting":
            key = org_id, state
            runs[key] = runs.get(key, 0) + 1
    hours = [(hour, org_id, state, count) for (org_id, state), count in sorted(runs.items())]
    ended: dict[OrgId, int] = {}
    for _, org_id, _, count in hours:
        ended[org_id] = ended.get(org_id, 0) + count
    return Rollups(
        [
            (today, org_id, ended.get(org_id, 0), count, round(seconds.get(org_id, 0.0)))
            for org_id, count in sorted(attempts.items())
        ],
        hours,
    )
