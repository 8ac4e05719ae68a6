"""Placing: admitted runs on their way to a host, the tickets for taking them, and the room of hosts. Pure."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from worker.ids import RunId
from worker.runs.run import AdmittedRun, Isolation
from worker.secret import Secret

# A run and the fencing token that it was admitted under.
Fence = tuple[RunId, int]
_TICKET = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9]{1,18})\.([A-Za-z0-9_-]{1,100})")


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
