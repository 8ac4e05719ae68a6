"""How far into each org's line the free slots can reach. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """What ranks an org's waiting runs: how many of it run, how many may, and its weight."""

    running: int
    most: int
    weight: int

    @property
    def room(self) -> int:
        return self.most - self.running

    def rank(self, place: int) -> float:
        return (self.running + place) / self.weight


def reach(lines: Sequence[Line], free: int) -> list[int]:
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
