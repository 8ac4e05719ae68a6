"""A cgroup of its own for each run with a memory cap, where the service manager has delegated a place.

That place is the parent of the worker's own cgroup, and only where that one is called
`worker`, as `DelegateSubgroup=worker` of the unit makes it: cgroups that are not
meant for us are left alone. See cgroups(7), and cgroup-v2 in the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
NAME = "worker"


class RunGroups:
    """The cgroups of runs, in a folder in which this process may make them."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._ended: set[Path] = set()

    @classmethod
    def find(cls, root: Path = ROOT, own: Path = OWN) -> RunGroups | None:
        """The place for them, or None where there is none; the caps are kept by watching then."""
        try:
            lines = own.read_text().splitlines()
            path = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
            mine = root / path.strip("/")
            if mine.name != NAME or "memory" not in (mine.parent / "cgroup.controllers").read_text().split():
                return None
            (mine.parent / "cgroup.subtree_control").write_text("+memory")
        except (OSError, StopIteration):  # cgroup v1, a read-only tree, or nothing delegated
            return None
        return cls(mine.parent)

    def make(self, run: int, memory: int) -> str | None:
        """A cgroup with this cap in bytes: the file that a process enters it by; None where there is none."""
        group = self._of(run)
        try:
            group.mkdir()
            (group / "memory.max").write_text(str(memory))
            (group / "memory.oom.group").write_text("1")
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                (group / "memory.swap.max").write_text("0")
        except OSError:
            self._ended.add(group)
            return None
        return str(group / "cgroup.procs")

    def ran_out(self, run: int) -> bool:
        """Whether the kernel has killed this run for its cap."""
        try:
            events = (self._of(run) / "memory.events").read_text().split()
        except OSError:
            return False
        return int(dict(zip(events[::2], events[1::2], strict=False)).get("oom_kill", 0)) > 0

    def remove(self, run: int) -> None:
        """The run has ended: take its cgroup away, now or with a later one."""
        self._ended.add(self._of(run))
        for group in list(self._ended):
            try:
                group.rmdir()
            except FileNotFoundError:
                self._ended.discard(group)
            except OSError:  # a process of it is still being taken apart
                continue
            else:
                self._ended.discard(group)

    def _of(self, run: int) -> Path:
        return self._place / f"run-{os.getpid()}-{run}"
