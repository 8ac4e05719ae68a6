"""Placers: engines that choose where an admitted run is tried. The database decides whether it may act.

By default (`pull`) a host asks a worker for runs, and nothing is placed. Another placer is an engine that
passes a ticket to one of the pool's hosts, which takes the run with it. An engine learns the ids of the pool
and the run, the fencing token and the ticket, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from worker.errors import Unavailable
from worker.model.runs.hosts import Placement, Ticket

# How an engine sees a placement: a host has it, none has it yet, or it has ended or never was.
Standing = Literal["taken", "queued", "gone"]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a TLS connection to an engine needs: contents of PEM files, None for the defaults."""

    ca_file: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


class EngineUnavailable(Unavailable):
    """The engine of a placer did not respond, or rejected the request."""

    code = "engine_unavailable"
    usual_fix = "check that [temporal] address and namespace in worker.toml are correct and reachable"


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
