"""Machine: what there is to run on, and the slots of the workers that are up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.settings.sections import ExecutionSettings

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine has: processors, and bytes of memory."""

    processors: float
    memory: int

    @classmethod
    def here(cls) -> Machine:
        """This one, or the part of it that a container may use."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _control_group("memory.max")
        quota, _, period = _control_group("cpu.max").partition(" ")
        processors = float(len(os.sched_getaffinity(0)))
        if quota.isdigit() and period.isdigit():
            processors = min(processors, int(quota) / int(period))
        return cls(processors, min(memory, int(limit)) if limit.isdigit() else memory)


@dataclass(frozen=True, slots=True)
class Has:
    """What there is for runs: slots and machines of the workers that are up, else of one that would be."""

    children: int
    inline: int
    machines: int
    up: bool

    @classmethod
    def of(cls, workers: list[Row], execution: ExecutionSettings) -> Has:
        if not workers:
            return cls(execution.max_children, execution.max_inline, 1, up=False)
        slots = [row["capacity"] or {} for row in workers]
        return cls(
            sum(int(each.get("children", 0)) for each in slots),
            sum(int(each.get("inline", 0)) for each in slots),
            len({row["host"] for row in workers}),
            up=True,
        )


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        # Not in a container, or on a system without control groups: the machine itself is the limit.
        return ""
