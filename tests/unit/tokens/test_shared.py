"""Shared tokens: one request per org and lifetime over all processes, and no token that is not the org's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import ORG, App, FakeCredentials, FakeIssuer, kinde_issuer, org
from worker.errors import RequestRejected, StoreUnavailable, TokenRefused
from worker.orgs import OrgRef
from worker.telemetry.events import Emitted
from worker.tokens import shared as shared_module
from worker.tokens.cache import Acquirer, EnforcedToken, Tokens
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import (
    RENEW,
    RESERVED,
    Found,
    NewToken,
    SharedTokens,
    StoredToken,
    TokenKey,
)

pytestmark = pytest.mark.anyio


@dataclass
class Kept:
    """A row of the fake store."""

    version: int = 0
    token: NewToken | None = None
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

    def _at(self, key: TokenKey) -> Kept:
        if self._rows.fault is not None:
            raise self._rows.fault
        return self._rows.rows.setdefault(key.id, Kept())

    @property
    def _now(self) -> float:
        return self._rows.clock.monotonic()

    async def find(self, key: TokenKey) -> Found:
        row = self._at(key)
        if row.token is None or row.expires_at <= self._now:
            return Found(row.version)
        token, now = row.token, self._now
        return Found(
            row.version,
            StoredToken(
                token.sealed,
                token.key_id,
                token.credential_id,
                now - row.received_at,
                row.expires_at - now,
            ),
        )

    async def reserve(self, key: TokenKey, issuer: str, version: int, seconds: float) -> bool:
        row = self._at(key)
        if row.version != version or row.reserved_until > self._now:
            return False
        row.reserved_by, row.reserved_until = self._holder, self._now + seconds
        return True

    async def renew(self, keys: Collection[TokenKey], seconds: float) -> None:
        for key in keys:
            row = self._at(key)
            if row.reserved_by == self._holder:
                row.reserved_until = self._now + seconds

    async def put(self, token: NewToken) -> None:
        row = self._at(token.key)
        row.version, row.token, row.reserved_until = row.version + 1, token, 0.0
        row.received_at, row.expires_at = self._now - token.received_ago, self._now + token.left

    async def release(self, key: TokenKey) -> None:
        row = self._at(key)
        if row.reserved_by == self._holder:
            row.reserved_until = 0.0

    async def drop(self, key: TokenKey) -> None:
        self._at(key).token = None


@dataclass
class Fleet:
    """Processes that share rows, credentials and an issuer."""

    clock: ManualClock
    issuer: FakeIssuer
    credentials: FakeCredentials
    rows: Rows
    ring: KeyRing
    app: App
    start: Callable[[], Tokens]

    def add_org(self, number: int) -> OrgRef:
        added = org(number)
        self.issuer.add(App(added.code, f"client-{number}", f"secret-{number}"))
        self.credentials.add(added, f"client-{number}", f"secret-{number}")
        return added

    async def until(self, waiting: asyncio.Future[EnforcedToken]) -> EnforcedToken:
        while not waiting.done():
            await self.clock.pass_time(0.5)
        return waiting.result()


@pytest.fixture
async def fleet(clock: ManualClock, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with opened(clock, tmp_path) as made:
        yield made


@asynccontextmanager
async def opened(clock: ManualClock, folder: Path) -> AsyncIterator[Fleet]:
    issuer, credentials, rows = FakeIssuer(clock), FakeCredentials(), Rows(clock)
    app = issuer.add(App("org_a", "client-a", "secret-a"))
    credentials.add(ORG, "client-a", "secret-a")
    ring = KeyRing.generate(folder / "keyring")
    started: list[Tokens] = []
    async with issuer.client() as client:
        made: Fleet

        def start() -> Tokens:
            store = FakeStore(rows, f"process-{len(started)}")
            shared = SharedTokens(store, lambda key_id=None: made.ring, clock)
            tokens = Tokens(
                {"main": kinde_issuer()},
                credentials,
                client=client,
                clock=clock,
                rng=random.Random(len(started)),
                shared=shared,
            )
            started.append(tokens)
            return tokens

        made = Fleet(clock, issuer, credentials, rows, ring, app, start)
        yield made
        for tokens in started:
            await tokens.close()


async def test_the_second_process_takes_the_token_of_the_first(fleet: Fleet) -> None:
    """A restart or a further worker costs no request, and the token is verified again."""
    first = await fleet.start().ensure(ORG, "main")
    fleet.clock.advance(600)

    second = await fleet.start().ensure(ORG, "main")

    assert fleet.issuer.count() == 1
    assert second.token.reveal() == first.token.reveal()
    assert second.token.expires_at == first.token.expires_at
    assert second.claims == first.claims


async def test_processes_that_ask_at_once_make_one_request(fleet: Fleet) -> None:
    """The others wait for the one that has reserved it."""
    gate = asyncio.Event()

    async def slow(form: dict[str, str]) -> httpx.Response:
        await gate.wait()
        return fleet.issuer.grant(form)

    fleet.issuer.answer = slow
    waiting = [asyncio.ensure_future(fleet.start().ensure(ORG, "main")) for _ in range(4)]
    await settle(50)
    gate.set()
    tokens = {(await fleet.until(one)).token.reveal() for one in waiting}

    assert fleet.issuer.count() == 1
    assert len(tokens) == 1


async def test_a_reservation_lasts_as_long_as_its_request(fleet: Fleet) -> None:
    """A request may wait for minutes for the issuer's rate."""
    gate = asyncio.Event()

    async def slow(form: dict[str, str]) -> httpx.Response:
        await gate.wait()
        return fleet.issuer.grant(form)

    fleet.issuer.answer = slow
    first = asyncio.ensure_future(fleet.start().ensure(ORG, "main"))
    await settle(50)
    second = asyncio.ensure_future(fleet.start().ensure(ORG, "main"))
    for _ in range(9):
        await fleet.clock.pass_time(RENEW / 4)
    before = fleet.issuer.count()
    gate.set()

    assert (await fleet.until(second)).token.reveal() == (await first).token.reveal()
    assert (before, fleet.issuer.count()) == (1, 1)


async def test_a_reservation_of_a_dead_process_ends(fleet: Fleet) -> None:
    """After `kill -9` of the one that requests, another does so within the reservation: one request more."""
    dead = FakeStore(fleet.rows, "dead")
    key = TokenKey.of(shared_module.TokenRequest("main", ORG, "https://api.acme.com", frozenset()))
    assert await dead.reserve(key, "main", 0, RESERVED)
    waiting = asyncio.ensure_future(fleet.start().ensure(ORG, "main"))
    await fleet.clock.pass_time(RESERVED - 1)
    before = fleet.issuer.count()

    await fleet.until(waiting)

    assert (before, fleet.issuer.count()) == (0, 1)


async def test_a_token_that_was_stored_meanwhile_is_not_requested_again(fleet: Fleet) -> None:
    """Between the look and the reservation another process may have stored its token."""
    store = FakeStore(fleet.rows, "late")
    key = TokenKey.of(shared_module.TokenRequest("main", ORG, "https://api.acme.com", frozenset()))
    version, _ = await store.find(key)
    await fleet.start().ensure(ORG, "main")

    assert not await store.reserve(key, "main", version, RESERVED)


async def test_one_process_renews_and_the_others_take_it(fleet: Fleet) -> None:
    """Four processes that use a token all day request it once per lifetime."""
    fleet.app.lifetime = 3600
    fleet_of = [fleet.start() for _ in range(4)]
    for _ in range(24 * 12):
        for tokens in fleet_of:
            await fleet.until(asyncio.ensure_future(tokens.ensure(ORG, "main")))
        fleet.clock.advance(300)
        await settle(20)

    # Renewed in the background at 60 to 90 % of its usable life.
    assert fleet.issuer.count() <= 24 / 0.6 + 1


async def test_a_credential_that_was_retired_serves_nobody(fleet: Fleet) -> None:
    """Also if its row came back, as from a backup."""
    await fleet.start().ensure(ORG, "main")
    fleet.credentials.orgs[ORG.id].clear()
    fleet.credentials.add(ORG, "client-b", "secret-b")
    fleet.issuer.add(App("org_a", "client-b", "secret-b"))

    token = await fleet.start().ensure(ORG, "main")

    assert token.claims.client_id == "client-b"
    assert fleet.issuer.count() == 2


@pytest.mark.parametrize("how", ["another org", "truncated", "damaged", "unknown key", "another generation"])
async def test_a_row_that_does_not_open_costs_one_request(
    fleet: Fleet, how: str, tmp_path: Path, emitted: list[Emitted]
) -> None:
    """A clear event, and a new token instead; the handler never sees another org's."""
    other = fleet.add_org(1)
    foreign = (await fleet.start().ensure(other, "main")).token.reveal()
    stolen = fleet.rows.one()
    assert stolen.token is not None
    await fleet.start().ensure(ORG, "main")
    mine = next(row for row in fleet.rows.rows.values() if row is not stolen)
    assert mine.token is not None
    match how:
        case "another org":
            mine.token = replace(mine.token, sealed=stolen.token.sealed)
        case "truncated":
            mine.token = replace(mine.token, sealed=mine.token.sealed[:20])
        case "damaged":
            mine.token = replace(mine.token, sealed=mine.token.sealed[:-1] + b"!")
        case "unknown key":
            fleet.ring = KeyRing.generate(tmp_path / "other")
        case "another generation":
            [credential] = fleet.credentials.orgs[ORG.id]
            fleet.credentials.orgs[ORG.id] = [replace(credential, generation=2)]

    token = await fleet.start().ensure(ORG, "main")

    assert token.claims.org_code == "org_a"
    assert token.token.reveal() != foreign
    assert fleet.issuer.count() == 3
    unopened = [seen.fields["org"] for seen in emitted if seen.event.name == "token.unopened"]
    assert unopened == ["org_a"]


async def test_without_the_seal_of_its_org_a_swapped_row_would_reach_enforcement(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: sealed without a place the row opens, and only enforcement still stops it."""
    monkeypatch.setattr(shared_module, "_place", lambda request, credential: [])
    other = fleet.add_org(1)
    await fleet.start().ensure(other, "main")
    stolen = fleet.rows.one()
    await fleet.start().ensure(ORG, "main")
    mine = next(row for row in fleet.rows.rows.values() if row is not stolen)
    assert mine.token is not None and stolen.token is not None
    mine.token = replace(mine.token, sealed=stolen.token.sealed)
    opened_tokens: list[str] = []
    enforce = Acquirer.enforce

    async def watched(self: object, request: object, granted: object, **rest: object) -> EnforcedToken:
        try:
            return await enforce(self, request, granted, **rest)  # type: ignore[arg-type]
        except TokenRefused as refused:
            opened_tokens.append(refused.reason)
            raise

    monkeypatch.setattr("worker.tokens.cache.Acquirer.enforce", watched)

    token = await fleet.start().ensure(ORG, "main")

    assert opened_tokens == ["org_mismatch"]
    assert token.claims.org_code == "org_a"


async def test_a_token_older_than_a_definition_allows_is_not_taken(fleet: Fleet) -> None:
    """`max_claims_age` counts from when the token was received, in whatever process."""
    await fleet.start().ensure(ORG, "main")
    fleet.clock.advance(301)

    await fleet.start().ensure(ORG, "main", max_claims_age=timedelta(minutes=5))

    assert fleet.issuer.count() == 2


async def test_fresh_requests_a_new_token_for_all(fleet: Fleet) -> None:
    """After a 401 the stored token is worth nothing; the new one is stored."""
    first, second = fleet.start(), fleet.start()
    await first.ensure(ORG, "main")
    fleet.clock.advance(60)
    minted = await first.ensure(ORG, "main", fresh=True)

    served = await second.ensure(ORG, "main")

    assert fleet.issuer.count() == 2
    assert served.token.reveal() == minted.token.reveal()


async def test_a_renewal_without_a_right_deletes_the_stored_token(fleet: Fleet) -> None:
    """The older token does not show that the org has fewer rights now."""
    scopes = frozenset({"read:kb"})
    tokens = fleet.start()
    await tokens.ensure(ORG, "main", scopes=scopes)
    fleet.clock.advance(60)
    fleet.app.replace = {"scope": "", "scp": []}
    with pytest.raises(TokenRefused):
        await tokens.ensure(ORG, "main", scopes=scopes, fresh=True)

    assert fleet.rows.one().token is None


async def test_an_invalid_renewal_leaves_the_stored_token(fleet: Fleet) -> None:
    """A fault of the issuer says nothing about the older token."""
    tokens = fleet.start()
    await tokens.ensure(ORG, "main")
    fleet.clock.advance(60)
    fleet.app.replace = {"iss": "https://elsewhere.example"}
    with pytest.raises(TokenRefused):
        await tokens.ensure(ORG, "main", fresh=True)

    assert fleet.rows.one().token is not None


async def test_a_failed_request_leaves_no_reservation(fleet: Fleet) -> None:
    """The next process need not wait for it."""
    fleet.issuer.answer = lambda form: httpx.Response(400, json={"error": "invalid_request"})
    with pytest.raises(RequestRejected):
        await fleet.start().ensure(ORG, "main")

    assert fleet.rows.one().reserved_until == 0.0


async def test_without_the_database_each_process_requests_its_own(fleet: Fleet) -> None:
    """A long run needs its token renewed also while the database is away."""
    fleet.rows.fault = StoreUnavailable("the database is away")
    for _ in range(2):
        await fleet.start().ensure(ORG, "main")

    assert fleet.issuer.count() == 2
