"""Sharing: which host of a pool admits next, and how many runs, so that each gets its part.

The worker knows which hosts ask here. Those that ask another worker it knows only by what they own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.clock import Clock
from worker.ids import WorkerId
from worker.model.runs.hosts import PoolLoad
from worker.model.runs.run import AdmittedRun, Isolation
from worker.store.host_store import HostStore

# Seconds for which a host is not waited for again that took nothing meanwhile: it drains, or cannot run it.
PASSED_OVER = 30.0
# Seconds in the line after which a host comes before emptier ones: its call has a deadline.
LONGEST = 2.0

Free = Mapping[Isolation, int]


@dataclass(slots=True, eq=False)
class _Asking:
    """A host that waits for its turn."""

    worker: WorkerId
    since: float
    turn: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Line:
    """The hosts of one pool that ask for runs, and what is known of all its hosts until `read_until`.

    `served` numbers the turns in which hosts got runs, of each the last.
    """

    asking: list[_Asking] = field(default_factory=list)
    # What to set so that the hosts ask that wait at this worker.
    takes: list[asyncio.Event] = field(default_factory=list)
    holder: _Asking | None = None
    load: PoolLoad | None = None
    read_at: float = 0.0
    read_until: float = float("-inf")
    turns: int = 0
    served: dict[WorkerId, int] = field(default_factory=dict)
    # The hosts that the runs are left to until `left_until`, and until when none is left to a host.
    left_to: set[WorkerId] = field(default_factory=set)
    left_until: float = float("-inf")
    passed_over: dict[WorkerId, float] = field(default_factory=dict)

    def pass_to(self, asking: _Asking | None) -> None:
        self.holder = asking
        if asking is not None:
            asking.turn.set()

    def share(self, worker: WorkerId) -> Sequence[float]:
        return () if self.load is None else self.load.shares.get(worker, ())


class Sharing:
    """Gives each host of a pool its turn to admit: first the emptiest, by its share of free slots.

    Of equal ones it is the one that has got nothing for longest. What waits and how full hosts are is read
    once for all. `poll` is in seconds: a run is left to a host elsewhere for half of it at most.
    """

    def __init__(self, store: HostStore, clock: Clock, poll: float) -> None:
        self._store = store
        self._clock = clock
        self._poll = poll
        self._patience = poll / 2
        self._lines: dict[str, _Line] = {}

    def wake(self) -> None:
        """Read again for every pool."""
        for line in self._lines.values():
            line.read_until = float("-inf")

    def pause(self, pool: str) -> float:
        """Seconds after which a host that got nothing should ask again."""
        left = self._line(pool).left_until - self._clock.monotonic()
        return left if 0 < left < self._poll else self._poll

    def takes(self, pool: str) -> list[asyncio.Event]:
        """The events of the open takes of a pool: set when a run is found, so that all their hosts ask."""
        return self._line(pool).takes

    async def share(
        self,
        pool: str,
        worker: WorkerId,
        free: Free,
        admit: Callable[[Free], Awaitable[Sequence[AdmittedRun]]],
    ) -> Sequence[AdmittedRun]:
        """What `admit` returns for this host's part of its free slots, once it is its turn.

        Nothing if no run is due, or if the runs are left to an emptier host.
        """
        line = self._line(pool)
        asking = _Asking(worker, self._clock.monotonic())
        line.asking.append(asking)
        try:
            if line.holder is None:
                line.pass_to(asking)
            await asking.turn.wait()
            await self._read(line, pool, worker)
            while (first := self._first(line)) is not asking and line.load is not None:
                asking.turn.clear()
                line.pass_to(first)
                await asking.turn.wait()
                await self._read(line, pool, worker)
            load = line.load
            if load is None or worker not in load.shares or self._left(line, load, worker):
                return ()
            runs = await admit(load.part(worker, free))
            if runs:
                load.admitted(worker, runs)
                line.turns += 1
                line.served[worker] = line.turns
                line.passed_over.pop(worker, None)
            else:
                line.passed_over[worker] = self._clock.monotonic() + PASSED_OVER
            return runs
        finally:
            line.asking.remove(asking)
            if line.holder is asking:
                line.pass_to(self._first(line) if line.asking else None)

    def _line(self, pool: str) -> _Line:
        return self._lines.setdefault(pool, _Line())

    async def _read(self, line: _Line, pool: str, worker: WorkerId) -> None:
        now, load = self._clock.monotonic(), line.load
        used_up = load is not None and (not any(load.due.values()) or worker not in load.shares)
        if now < line.read_until and not used_up:
            return
        # Before the answer: a wake meanwhile has it read again.
        line.read_at, line.read_until = now, now + self._patience
        none_known = load is None or not any(load.due.values())
        try:
            line.load = load = await self._store.pool_load(pool)
        except BaseException:
            line.read_until = float("-inf")
            raise
        line.passed_over = {one: until for one, until in line.passed_over.items() if until > now}
        if load is None:
            line.left_to = set()
            return
        line.served = {one: turn for one, turn in line.served.items() if one in load.shares}
        if none_known:
            # One host has looked by its own poll: let the others ask too, before it is decided who is first.
            for take in line.takes:
                take.set()
            await asyncio.sleep(0)

    def _first(self, line: _Line) -> _Asking:
        """Whose turn it is. Who has waited too long comes before all that are emptier."""
        first = line.asking[0]
        if self._clock.monotonic() - first.since >= LONGEST:
            return first
        return max(line.asking, key=lambda one: (line.share(one.worker), -line.served.get(one.worker, 0)))

    def _left(self, line: _Line, load: PoolLoad, worker: WorkerId) -> bool:
        """Whether to leave the runs to an emptier host that does not ask here, but at another worker."""
        now, mine = self._clock.monotonic(), load.shares[worker]
        here = {one.worker for one in line.asking}
        emptier = {one for one, share in load.shares.items() if share > mine and one not in here}
        left = self._patience - load.waited - (now - line.read_at)
        if left <= 0:
            line.passed_over |= dict.fromkeys(line.left_to & emptier, now + PASSED_OVER)
            line.left_to = set()
        elif emptier := emptier - line.passed_over.keys():
            line.left_to, line.left_until = emptier, now + left
            # Then it shows whether they took the runs.
            line.read_until = min(line.read_until, line.left_until)
            return True
        return False
