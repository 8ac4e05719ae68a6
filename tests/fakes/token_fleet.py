"""Processes that share access tokens, without a database: what each keeps, and what all see."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import ORG, App, FakeCredentials, FakeIssuer, add_org, kinde_issuer
from worker.model.claims import Enforced
from worker.model.orgs import OrgRef
from worker.tokens.cache import MEMORY, Tokens
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import Found, SharedTokens, StoredToken, TokenRequest


@dataclass
class Kept:
    """A row of the fake store."""

    version: int = 0
    token: StoredToken | None = None
    received_at: float = 0.0
    expires_at: float = 0.0
    reserved_by: str = ""
    reserved_until: float = 0.0


class Rows:
    """What the stores of all processes share; `fault` is raised by every call."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.rows: dict[str, Kept] = {}
        self.fault: Exception | None = None

    def one(self) -> Kept:
        [row] = self.rows.values()
        return row


class FakeStore:
    """A `TokenStore` of one process."""

    def __init__(self, rows: Rows, holder: str) -> None:
        self._rows = rows
        self._holder = holder

    def _at(self, request: TokenRequest) -> Kept:
        if self._rows.fault is not None:
            raise self._rows.fault
        return self._rows.rows.setdefault(request.id, Kept())

    @property
    def _now(self) -> float:
        return self._rows.clock.monotonic()

    async def find(self, request: TokenRequest) -> Found:
        row = self._at(request)
        if row.token is None or row.expires_at <= self._now:
            return Found(row.version)
        age, left = self._now - row.received_at, row.expires_at - self._now
        return Found(row.version, replace(row.token, age=age, left=left))

    async def find_all(self, requests: Sequence[TokenRequest]) -> dict[TokenRequest, Found]:
        return {each: await self.find(each) for each in requests}

    async def lives(self, requests: Sequence[TokenRequest]) -> dict[TokenRequest, tuple[float, float]]:
        found = {each: (await self.find(each)).token for each in requests}
        return {each: (token.age, token.left) for each, token in found.items() if token is not None}

    async def reserve(self, request: TokenRequest, version: int, seconds: float) -> bool:
        row = self._at(request)
        if row.version != version or row.reserved_until > self._now:
            return False
        row.reserved_by, row.reserved_until = self._holder, self._now + seconds
        return True

    async def renew(self, requests: Collection[TokenRequest], seconds: float) -> None:
        for request in requests:
            row = self._at(request)
            if row.reserved_by == self._holder:
                row.reserved_until = self._now + seconds

    async def put(self, request: TokenRequest, token: StoredToken) -> None:
        row = self._at(request)
        row.version, row.token, row.reserved_until = row.version + 1, token, 0.0
        row.received_at, row.expires_at = self._now - token.age, self._now + token.left

    async def release(self, request: TokenRequest) -> None:
        row = self._at(request)
        if row.reserved_by == self._holder:
            row.reserved_until = 0.0

    async def drop(self, request: TokenRequest) -> None:
        self._at(request).token = None


@dataclass
class Fleet:
    """Processes that share rows, credentials and an issuer."""

    clock: ManualClock
    issuer: FakeIssuer
    credentials: FakeCredentials
    rows: Rows
    ring: KeyRing
    app: App
    start: Callable[..., Tokens]
    # Raised instead of returning the ring that has a stored token's key.
    ring_fault: Exception | None = None

    def ring_with(self, key_id: str | None = None) -> KeyRing:
        if key_id is not None and self.ring_fault is not None:
            raise self.ring_fault
        return self.ring

    def add_org(self, number: int) -> OrgRef:
        return add_org(self.issuer, self.credentials, number)

    async def until(self, waiting: asyncio.Future[Enforced]) -> Enforced:
        while not waiting.done():
            await self.clock.pass_time(0.5)
        return waiting.result()


@asynccontextmanager
async def opened(clock: ManualClock, folder: Path, *, rate: float = 10.0) -> AsyncIterator[Fleet]:
    """A fleet with one org; `rate` is that of its issuer."""
    issuer, credentials, rows = FakeIssuer(clock), FakeCredentials(), Rows(clock)
    app = issuer.add(App("org_a", "client-a", "secret-a"))
    credentials.add(ORG, "client-a", "secret-a")
    ring = KeyRing.generate(folder / "keyring")
    started: list[Tokens] = []
    async with issuer.client() as client:
        made: Fleet

        def start(*, shared: bool = True, memory: int = MEMORY) -> Tokens:
            store = FakeStore(rows, f"process-{len(started)}")
            tokens = Tokens(
                {"main": kinde_issuer(max_requests_per_second=rate)},
                credentials,
                client=client,
                clock=clock,
                rng=random.Random(len(started)),
                shared=SharedTokens(store, lambda key_id=None: made.ring_with(key_id), clock)
                if shared
                else None,
                memory=memory,
            )
            started.append(tokens)
            return tokens

        made = Fleet(clock, issuer, credentials, rows, ring, app, start)
        yield made
        for tokens in started:
            await tokens.close()
