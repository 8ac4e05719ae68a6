"""Looks, ten times a second, whether the processes of a run use more memory than its cap."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from worker.execution.processes import linux

TICK = 0.1


class MemoryWatch:
    """Made in the zygote before it forks; `due_at` is when to look next, on the monotonic clock."""

    def __init__(self) -> None:
        self._own = linux.resident(os.getpid())
        self.due_at = float("inf")

    def begin(self) -> None:
        """A run with a cap starts."""
        self.due_at = min(self.due_at, time.monotonic() + TICK)

    def over_cap(self, caps: Mapping[int, int]) -> list[int]:
        """The first processes of the runs over their caps, where it is time to look.

        `caps` are in bytes, by a run's first process.
        """
        if time.monotonic() < self.due_at:
            return []
        self.due_at = time.monotonic() + TICK if caps else float("inf")
        table = linux.processes() if caps else {}
        return [pid for pid, cap in caps.items() if self._used(table, pid, cap) > cap]

    def _used(self, table: Mapping[int, linux.Process], leader: int, cap: int) -> int:
        return linux.memory({leader} | linux.descendants(table, [leader]), own=self._own, limit=cap)
