"""The service that simulated runs call: it answers, pauses orgs, and notes what it sees and from whom."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpcore

from tests.simulation.loop import SeededLoop, SimulatedProcess
from tests.simulation.models import ORIGINS, Models
from worker.model.limits import BucketKey, Share

LIMITED, FREE = "https://api.acme.com", "https://status.acme.com"


@dataclass(frozen=True)
class Sender:
    """Who sends a request: a broker, for a worker or host. `is_stopped` if it should no longer."""

    broker: SimulatedProcess
    worker: SimulatedProcess
    queued_at: float
    is_stopped: bool


@dataclass
class Seen:
    """One request, from when it left its broker until its answer was there or its connection closed."""

    at: float
    sender: Sender
    origin: str
    org: str
    token_of: str
    run: str
    attempt: int
    number: str
    ended_at: float = float("inf")
    status: int = 0
    # Seconds for which the answer pauses the org.
    pause: float = 0.0


@dataclass
class Service:
    """Both origins. `note` gets each request as it is seen."""

    loop: SeededLoop
    note: Callable[[Seen], object] = lambda seen: None
    seen: list[Seen] = field(default_factory=list)
    # By run and origin the requests for which a connection was opened.
    begun: Counter[tuple[str, str]] = field(default_factory=Counter)
    # By origin and org the pause that the next answer asks for.
    pauses: dict[tuple[str, str], float] = field(default_factory=dict)
    # The APIs of models, where runs send requests to them.
    models: Models | None = None
    # By worker or host when its lease was renewed, and until when it may send then.
    leases: dict[SimulatedProcess, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    # By broker and key of a limit when it was given slots, and until when.
    slots: dict[tuple[SimulatedProcess, BucketKey], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def renewed(self, worker: SimulatedProcess, freeze_at: float) -> None:
        self.leases[worker].append((self.loop.time(), freeze_at))

    def leased(self, broker: SimulatedProcess, key: BucketKey, share: Share) -> None:
        self.slots[broker, key].append((self.loop.time(), share.slots_until))

    def begin(self, request: httpcore.Request) -> None:
        """A broker opens a connection for a request."""
        if origin_of(request) in ORIGINS:
            return
        self.begun[headers_of(request)["x-run"], origin_of(request)] += 1

    async def answer(
        self, sender: Sender, request: httpcore.Request
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """One request and its answer, as the broker's connection has them."""
        sent, origin = headers_of(request), origin_of(request)
        if self.models is not None and origin in ORIGINS:
            return await self._answer_of_model(self.models, sender, request)
        seen = Seen(
            self.loop.time(),
            sender,
            origin,
            sent["x-org"],
            org_of(sent.get("authorization", "")),
            sent["x-run"],
            int(sent["x-attempt"]),
            sent["x-number"],
        )
        self.seen.append(seen)
        self.note(seen)
        self.loop.note(sender.broker, f"sends {seen.number} of {seen.org} to {origin}")
        try:
            await asyncio.sleep(self.loop.delay())
            seen.pause = self.pauses.pop((origin, seen.org), 0.0)
            await asyncio.sleep(0.2 * self.loop.choices.random() + self.loop.delay())
            if seen.pause:
                seen.status = 429
                return 429, [(b"Retry-After", f"{seen.pause:.3f}".encode())], b"{}"
            seen.status = 200
            return 200, [], b"{}"
        finally:
            seen.ended_at = self.loop.time()

    async def _answer_of_model(
        self, models: Models, sender: Sender, request: httpcore.Request
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """A request that a run sends on its own, as it is not in a batch."""
        assert isinstance(request.stream, AsyncIterable)
        body = b"".join([part async for part in request.stream])
        await asyncio.sleep(self.loop.delay())
        status, content = models.answer_alone(request, body)
        self.loop.note(sender.broker, f"sends a request to {origin_of(request)}")
        await asyncio.sleep(self.loop.delay())
        return status, [(b"Content-Type", b"application/json")], content


def headers_of(request: httpcore.Request) -> dict[str, str]:
    return {name.lower().decode(): value.decode() for name, value in request.headers}


def origin_of(request: httpcore.Request) -> str:
    return f"{request.url.scheme.decode()}://{request.url.host.decode()}"


def org_of(authorization: str) -> str:
    """The org of a bearer token, which the service does not verify here."""
    _, _, token = authorization.partition(" ")
    if token.count(".") != 2:
        return ""
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return str(claims.get("org_code", ""))
