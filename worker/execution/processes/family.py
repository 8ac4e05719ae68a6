"""The processes of runs, as their parent holds them: who leads, what is left behind, who is below."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worker.execution.processes import linux


@dataclass(slots=True)
class Leader:
    """The first process of a run. `why` says for what reason the zygote itself killed it."""

    run: int
    pid: int
    memory: int | None
    why: str | None = None
    ended: dict[str, Any] | None = None


class Family:
    """Leaders by pid, alive; all else that has this process for a parent comes from a dead run."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.leaders: dict[int, Leader] = {}

    def signal(self, run: int, number: signal.Signals) -> None:
        """Send a signal to the first process of a run."""
        for leader in self.leaders.values():
            if leader.run == run:
                linux.send(leader.pid, number)

    def kill_below(self, run: int) -> None:
        """Kill what the first process of a run has started, also what stands still."""
        roots = [leader.pid for leader in self.leaders.values() if leader.run == run]
        for pid in linux.descendants(linux.processes(), roots):
            linux.send(pid, signal.SIGKILL)

    def kill_all(self, why: str) -> None:
        """Kill the first process of every run, for this reason."""
        for leader in self.leaders.values():
            leader.why = leader.why or why
            linux.send(leader.pid, signal.SIGKILL)

    def reap(self) -> Iterator[Leader]:
        """Take leave of all that have ended, and give the leaders among them, with how they ended."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            leader = self.leaders.pop(pid, None)
            if leader is not None:
                leader.ended = {"status": status, "memory": usage.ru_maxrss * 1024}
                yield leader

    def orphans(self) -> set[int]:
        """What dead runs have left behind, alive or not reaped yet."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # not one child: the table need not be read
            return set()
        table = linux.processes()
        # Leaders are subreapers, so whatever else is a child of ours comes from a dead run.
        adopted = {
            process.pid
            for process in table.values()
            if process.parent == self._pid and process.pid not in self.leaders
        }
        found = adopted | linux.descendants(table, adopted)
        # A dead one that is still to be reaped counts: a run is over once none of its processes is left.
        return {pid for pid in found if table[pid].state != "X"}

    def everyone(self) -> set[int]:
        """All processes below this one."""
        table = linux.processes()
        return {pid for pid in linux.descendants(table, [self._pid]) if table[pid].state != "X"}
