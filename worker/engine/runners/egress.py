"""The broker as runners see it: what sends the requests of runs, if the feature that has it is installed."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Protocol

from worker.engine.runners.contract import RunServices, Work
from worker.model.runs.lease import Lease
from worker.model.runs.outcome import Failed, HandedBack, Outcome, TimedOut

STARVED = "the broker of its worker or host, which sends its requests, did not start"


class BrokeredAttempt(Protocol):
    """One attempt, whose token and bound secrets the broker gets with its first request."""

    def open(self, door: socket.socket) -> None:
        """Serve what its process passes over the other end of `door`, which this closes at the end."""

    @property
    def starved(self) -> bool:
        """Whether its requests had to wait for a broker that did not start."""

    def connect(self) -> socket.socket:
        """A stream to the broker, for a handler in this process. Raises OSError once it has ended."""

    def stop(self) -> None:
        """Send nothing more of what is queued, and close its connections: it is killed, or its lease lost."""

    async def end(self) -> None:
        """Drop it: none of its processes is left. What it has sent is in its services afterwards."""

    def drop(self) -> None:
        """Drop it without waiting, unless that is done; what it has sent is not recorded."""


class EgressBroker(Protocol):
    """The broker's process, which is started again when it ends."""

    @property
    def fault(self) -> str | None:
        """Why none is up that could send; None also while one is about to start."""

    def start(self) -> None:
        """Start it; call this before any key is read. Needs no running loop."""

    def await_start(self) -> str | None:
        """Wait until it is up, before `attach`; returns why it is not."""

    def attach(self) -> None:
        """Listen to it on the running loop, and start another one when it ends."""

    def serve(self, work: Work, services: RunServices) -> BrokeredAttempt:
        """Serve an attempt."""

    def environment(self, work: Work) -> Mapping[str, str]:
        """The placeholders of the variables that are bound to an origin, for a process of the run."""

    def renewed(self, lease: Lease) -> None:
        """The lease is renewed: runs may send until its `freeze_at`. Thread-safe."""

    async def close(self) -> None:
        """End it."""


def unless_starved(outcome: Outcome, brokered: BrokeredAttempt | None) -> Outcome:
    """The outcome of an attempt; one that failed because no broker was up waits for another worker."""
    if brokered is None or not brokered.starved:
        return outcome
    match outcome:
        case TimedOut() | Failed(reason="error", permanent=False):
            return HandedBack(STARVED)
    return outcome
