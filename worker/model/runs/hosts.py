"""Hosts as workers know them: who calls, the load of a pool, and runs on their way with tickets. Pure."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from worker.ids import RunId, WorkerId
from worker.model.runs.run import AdmittedRun, Isolation
from worker.secret import Secret

# The capacity of an incarnation, by isolation.
SLOTS: Mapping[Isolation, str] = {"child": "children", "inline": "inline"}
# Handlers that one host may declare.
MAX_HANDLERS = 500
# A run and the fencing token that it was admitted under.
Fence = tuple[RunId, int]
_TICKET = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9]{1,18})\.([A-Za-z0-9_-]{1,100})")


class TooManyHandlers(ValueError):
    """A host declares more handlers than are stored for one token; the message names the limit."""


@dataclass(frozen=True, slots=True)
class HostCaller:
    """A host that makes a call, and its incarnation: None if that is another host's or unknown.

    `ended` if the incarnation has ended, `moved` if it serves another pool than its host has now.
    """

    id: str
    name: str
    pool: str
    worker: WorkerId | None = None
    ended: bool = False
    moved: bool = False
    token_sha256: str = field(default="", repr=False)


@dataclass(slots=True)
class PoolLoad:
    """What waits in a pool, and the slots of the live incarnations of its hosts, by isolation.

    `due` counts no more runs than there are slots. The oldest of them has been due for `waited` seconds.
    `shares` are the shares of free slots of each isolation, the smallest first.
    """

    due: Counter[Isolation]
    waited: float
    slots: Mapping[WorkerId, Mapping[Isolation, int]]
    used: Mapping[WorkerId, Counter[Isolation]]
    shares: dict[WorkerId, tuple[float, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.shares = {worker: self._share(worker) for worker in self.slots}

    def part(self, worker: WorkerId, free: Mapping[Isolation, int]) -> dict[Isolation, int]:
        """The runs that a host may be given of what is due, given its free slots.

        While others have free slots as well, at most half of all its slots at a time: what is due may be
        more than limits allow.
        """
        return {isolation: self._part(worker, isolation, count) for isolation, count in free.items()}

    def admitted(self, worker: WorkerId, runs: Iterable[AdmittedRun]) -> None:
        """Count runs that a host was given."""
        given = Counter(run.isolation for run in runs)
        self.due -= given
        self.used[worker].update(given)
        self.shares[worker] = self._share(worker)

    def _share(self, worker: WorkerId) -> tuple[float, ...]:
        kinds = ((kind, slots) for kind, slots in self.slots[worker].items() if slots)
        return tuple(sorted(self._free(worker, kind) / slots for kind, slots in kinds))

    def _free(self, worker: WorkerId, isolation: Isolation) -> int:
        return max(0, self.slots[worker][isolation] - self.used[worker][isolation])

    def _part(self, worker: WorkerId, isolation: Isolation, free: int) -> int:
        slots = self.slots[worker][isolation]
        # Its own word, as an end that frees a slot may not be written yet; at most what it registered.
        own = min(free, slots)
        if not own or not any(self._free(one, isolation) for one in self.slots if one != worker):
            return own
        # As full as all hosts are once they have what is due.
        total = sum(each[isolation] for each in self.slots.values())
        others = (one for one in self.slots if one != worker)
        full = slots - own + sum(self.slots[one][isolation] - self._free(one, isolation) for one in others)
        level = min(full + self.due[isolation], total)
        return max(1, min(own, _ceil(slots * level, total) - (slots - own), _ceil(slots, 2)))


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


@dataclass(frozen=True, slots=True)
class Placement:
    """An admitted run on its way to a host, under one fencing token."""

    run_id: RunId
    fencing_token: int
    pool: str
    isolation: Isolation

    @classmethod
    def of(cls, run: AdmittedRun) -> Placement:
        return cls(run.id, run.fencing_token, run.pool, run.isolation)

    @property
    def fence(self) -> Fence:
        return self.run_id, self.fencing_token


@dataclass(slots=True, eq=False, repr=False)
class Ticket:
    """What a host takes one run with, once: `RUN.FENCING_TOKEN.SECRET`. The database has its hash only."""

    run_id: RunId
    fencing_token: int
    _secret: Secret

    @classmethod
    def new(cls, run_id: RunId, fencing_token: int) -> Ticket:
        return cls(run_id, fencing_token, Secret(secrets.token_urlsafe(32)))

    @classmethod
    def parse(cls, text: str) -> Ticket | None:
        """The ticket in this text; None if it is not one."""
        found = _TICKET.fullmatch(text)
        return None if found is None else cls(RunId(found[1]), int(found[2]), Secret(found[3]))

    def reveal(self) -> str:
        return f"{self.run_id}.{self.fencing_token}.{self._secret.reveal()}"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.reveal().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement that no host has taken; `age` is the time since it was placed."""

    placement: Placement
    age: timedelta
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class PoolRoom:
    """What a pool's hosts can take: their free slots by isolation, and the handlers that all of them offer.

    A handler comes with the limit of its concurrent runs, or None.
    """

    free: Mapping[Isolation, int]
    handlers: Mapping[str, int | None]

    @property
    def is_empty(self) -> bool:
        return not self.handlers or not any(self.free.values())
