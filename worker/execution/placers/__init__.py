"""Placers: engines that choose where an admitted run is tried. The database decides whether it may act.

By default (`pull`) a host asks a worker for runs, and nothing is placed. Another placer is an engine that
passes a ticket to one of the pool's hosts, which takes the run with it. An engine learns the ids of the pool
and the run, the fencing token and the ticket, and nothing else.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal, Protocol

from worker.errors import Unavailable
from worker.ids import RunId
from worker.runs.run import Isolation
from worker.secret import Secret

# How an engine sees a placement: a host has it, none has it yet, or it has ended or never was.
Standing = Literal["taken", "queued", "gone"]


class EngineUnavailable(Unavailable):
    """The engine of a placer did not respond, or rejected the request."""

    code = "engine_unavailable"
    usual_fix = "check that [temporal] address and namespace in worker.toml are correct and reachable"


@dataclass(frozen=True, slots=True)
class Placement:
    """An admitted run on its way to a host, under one fencing token."""

    run_id: RunId
    fencing_token: int
    pool: str
    isolation: Isolation


class Ticket:
    """What a host takes one run with, once: `RUN.FENCING_TOKEN.SECRET`. The database has its hash only."""

    __slots__ = ("_secret", "fencing_token", "run_id")

    def __init__(self, run_id: RunId, fencing_token: int, secret: Secret) -> None:
        self.run_id = run_id
        self.fencing_token = fencing_token
        self._secret = secret

    @classmethod
    def new(cls, run_id: RunId, fencing_token: int) -> Ticket:
        return cls(run_id, fencing_token, Secret(secrets.token_urlsafe(32)))

    @classmethod
    def parse(cls, text: str) -> Ticket | None:
        """The ticket in this text; None if it is not one."""
        run_id, _, rest = text.partition(".")
        number, _, secret = rest.partition(".")
        if not (number.isascii() and number.isdigit() and len(number) < 19 and secret and run_id):
            return None
        return cls(RunId(run_id), int(number), Secret(secret))

    def reveal(self) -> str:
        return f"{self.run_id}.{self.fencing_token}.{self._secret.reveal()}"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.reveal().encode()).hexdigest()


class Placer(Protocol):
    """An engine that offers runs to the hosts of a pool."""

    async def place(self, placement: Placement, ticket: Ticket) -> None:
        """Offer a run to the hosts of its pool; offering it twice changes nothing.

        Raises:
            EngineUnavailable: the engine did not respond. It may have the ticket nevertheless.
        """

    async def withdraw(self, placement: Placement) -> None:
        """Stop offering it. It is not an error if the engine does not know it any more.

        Raises EngineUnavailable.
        """

    async def describe(self, placement: Placement) -> Standing:
        """How the engine sees it. Raises EngineUnavailable."""

    async def check(self) -> None:
        """Raise EngineUnavailable if the engine does not respond."""
