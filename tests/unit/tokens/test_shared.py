"""Shared tokens: one request per org and lifetime over all processes, and no token that is not the org's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import AUDIENCE, ORG, App, org
from tests.fakes.token_fleet import FakeStore, Fleet, opened
from worker.errors import ConfigurationError, RequestRejected, StoreUnavailable, TokenRefused
from worker.ids import OrgId
from worker.model.claims import Enforced
from worker.model.orgs import OrgRef, TokenWant
from worker.telemetry.events import Emitted
from worker.tokens import shared as shared_module
from worker.tokens.acquirer import Acquirer
from worker.tokens.cache import MEMORY, Tokens
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import RENEW, RESERVED, TokenRequest


@pytest.fixture
async def fleet(clock: ManualClock, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with opened(clock, tmp_path) as made:
        yield made


async def test_the_second_process_takes_the_token_of_the_first(fleet: Fleet) -> None:
    """A restart or a further worker costs no request, and the token is verified again."""
    first = await fleet.start().ensure(TokenWant(ORG, "main"))
    fleet.clock.advance(600)

    second = await fleet.start().ensure(TokenWant(ORG, "main"))

    assert fleet.issuer.count() == 1
    assert second.token.reveal() == first.token.reveal()
    assert second.token.expires_at == first.token.expires_at
    assert second.claims == first.claims


async def test_processes_that_ask_at_once_make_one_request(fleet: Fleet) -> None:
    """The others wait for the one that has reserved it."""
    gate = fleet.issuer.hold()
    waiting = [asyncio.ensure_future(fleet.start().ensure(TokenWant(ORG, "main"))) for _ in range(4)]
    await settle(50)
    gate.set()
    tokens = {(await fleet.until(one)).token.reveal() for one in waiting}

    assert fleet.issuer.count() == 1
    assert len(tokens) == 1


async def test_a_reservation_lasts_as_long_as_its_request(fleet: Fleet) -> None:
    """A request may wait for minutes for the issuer's rate."""
    gate = fleet.issuer.hold()
    first = asyncio.ensure_future(fleet.start().ensure(TokenWant(ORG, "main")))
    await settle(50)
    second = asyncio.ensure_future(fleet.start().ensure(TokenWant(ORG, "main")))
    for _ in range(9):
        await fleet.clock.pass_time(RENEW / 4)
    before = fleet.issuer.count()
    gate.set()

    assert (await fleet.until(second)).token.reveal() == (await first).token.reveal()
    assert (before, fleet.issuer.count()) == (1, 1)


async def test_a_reservation_of_a_dead_process_ends(fleet: Fleet) -> None:
    """After `kill -9` of the one that requests, another does so within the reservation: one request more."""
    dead = FakeStore(fleet.rows, "dead")
    request = TokenRequest("main", ORG, AUDIENCE, frozenset())
    assert await dead.reserve(request, 0, RESERVED)
    waiting = asyncio.ensure_future(fleet.start().ensure(TokenWant(ORG, "main")))
    await fleet.clock.pass_time(RESERVED - 1)
    before = fleet.issuer.count()

    await fleet.until(waiting)

    assert (before, fleet.issuer.count()) == (0, 1)


async def test_a_token_that_was_stored_meanwhile_is_not_requested_again(fleet: Fleet) -> None:
    """Between the look and the reservation another process may have stored its token."""
    store = FakeStore(fleet.rows, "late")
    request = TokenRequest("main", ORG, AUDIENCE, frozenset())
    version, _ = await store.find(request)
    await fleet.start().ensure(TokenWant(ORG, "main"))

    assert not await store.reserve(request, version, RESERVED)


async def test_one_process_renews_and_the_others_take_it(fleet: Fleet) -> None:
    """Four processes that use a token all day request it once per lifetime."""
    fleet.app.lifetime = 3600
    fleet_of = [fleet.start() for _ in range(4)]
    for _ in range(24 * 12):
        for tokens in fleet_of:
            await fleet.until(asyncio.ensure_future(tokens.ensure(TokenWant(ORG, "main"))))
        fleet.clock.advance(300)
        await settle(20)

    # Renewed in the background at 60 to 90 % of its usable life.
    assert fleet.issuer.count() <= 24 / 0.6 + 1


async def test_a_credential_that_was_retired_serves_nobody(fleet: Fleet, emitted: list[Emitted]) -> None:
    """Also if its row came back, as from a backup: it is reported and replaced."""
    await fleet.start().ensure(TokenWant(ORG, "main"))
    fleet.credentials.add(ORG, "client-b", "secret-b")
    del fleet.credentials.orgs[ORG.id][1:]
    fleet.issuer.add(App("org_a", "client-b", "secret-b"))

    token = await fleet.start().ensure(TokenWant(ORG, "main"))

    assert token.claims.client_id == "client-b"
    assert fleet.issuer.count() == 2
    [error] = [seen.fields["error"] for seen in emitted if seen.event.name == "token.unopened"]
    assert error == "its credential is retired, or does not open"


async def test_a_token_of_a_generation_added_just_now_is_taken(fleet: Fleet, emitted: list[Emitted]) -> None:
    """A worker caches credentials for two seconds, and another may know a newer one already."""
    fleet.credentials.add(ORG, "client-b", "secret-b")
    fleet.issuer.add(App("org_a", "client-b", "secret-b"))
    newest = fleet.credentials.orgs[ORG.id].pop(0)
    late = fleet.start()
    await late.ensure(TokenWant(ORG, "main", scopes=frozenset({"read:kb"})))
    fleet.credentials.orgs[ORG.id].insert(0, newest)
    stored = await fleet.start().ensure(TokenWant(ORG, "main"))

    taken = await late.ensure(TokenWant(ORG, "main"))

    assert taken.token.reveal() == stored.token.reveal()
    assert taken.claims.client_id == "client-b"
    assert fleet.issuer.count() == 2
    assert [seen for seen in emitted if seen.event.name == "token.unopened"] == []


@pytest.mark.parametrize(
    "how",
    [
        *("another org", "other scopes", "truncated", "empty", "damaged", "unknown key", "no key ring"),
        "another generation",
    ],
)
@pytest.mark.parametrize("looked_up", [False, True], ids=["by itself", "looked up with others"])
async def test_a_row_that_does_not_open_costs_one_request(
    fleet: Fleet, how: str, looked_up: bool, tmp_path: Path, emitted: list[Emitted]
) -> None:
    """A clear event, and a new token instead; the handler never sees another org's."""
    other = fleet.add_org(1)
    foreign = (await fleet.start().ensure(TokenWant(other, "main"))).token.reveal()
    stolen = fleet.rows.one()
    assert stolen.token is not None
    await fleet.start().ensure(TokenWant(ORG, "main"))
    mine = next(row for row in fleet.rows.rows.values() if row is not stolen)
    assert mine.token is not None
    match how:
        case "another org":
            mine.token = replace(mine.token, sealed=stolen.token.sealed)
        case "truncated":
            mine.token = replace(mine.token, sealed=mine.token.sealed[:20])
        case "other scopes":
            await fleet.start().ensure(TokenWant(ORG, "main", scopes=frozenset({"read:kb"})))
            [wider] = [row for row in fleet.rows.rows.values() if row not in (mine, stolen)]
            assert wider.token is not None
            mine.token = replace(mine.token, sealed=wider.token.sealed)
        case "empty":
            mine.token = replace(mine.token, sealed=b"")
        case "no key ring":
            fleet.ring_fault = ConfigurationError("the key ring cannot be read")
        case "damaged":
            last = mine.token.sealed[-1] ^ 1
            mine.token = replace(mine.token, sealed=mine.token.sealed[:-1] + bytes([last]))
        case "unknown key":
            fleet.ring = KeyRing.generate(tmp_path / "other")
        case "another generation":
            [credential] = fleet.credentials.orgs[ORG.id]
            fleet.credentials.orgs[ORG.id] = [replace(credential, generation=2)]

    tokens = await looked_up_by(fleet, ORG) if looked_up else fleet.start()
    requests = fleet.issuer.count()

    token = tokens.at_hand(TokenWant(ORG, "main")) or await tokens.ensure(TokenWant(ORG, "main"))

    assert token.claims.org_code == "org_a"
    assert token.token.reveal() != foreign
    assert fleet.issuer.count() == requests + 1
    unopened = [seen.fields["org"] for seen in emitted if seen.event.name == "token.unopened"]
    assert unopened == ["org_a"]


async def looked_up_by(fleet: Fleet, *orgs: OrgRef) -> Tokens:
    """A process that has the issuer's keys, and has looked up the tokens of these orgs."""
    tokens = fleet.start()
    # A token of another org: with it come the keys.
    known = org(99)
    if known.id not in fleet.credentials.orgs:
        fleet.add_org(99)
    await tokens.ensure(TokenWant(known, "main"))
    assert set(await tokens.load([known, *orgs])) == {each.id for each in orgs}
    await tokens.look_up([want(each) for each in orgs])
    return tokens


def want(of: OrgRef) -> TokenWant:
    return TokenWant(of, "main")


async def test_a_looked_up_token_is_at_hand_for_a_moment(fleet: Fleet) -> None:
    """Verified and enforced as any other, without another look; then it stays in memory."""
    stored = await fleet.start().ensure(TokenWant(ORG, "main"))
    late, prompt = await looked_up_by(fleet, ORG), await looked_up_by(fleet, ORG)
    requests = fleet.issuer.count()
    fleet.rows.fault = StoreUnavailable("down")
    fleet.clock.advance(1)

    token = prompt.at_hand(TokenWant(ORG, "main"))

    assert token is not None
    assert token.token.reveal() == stored.token.reveal()
    assert (token.claims, token.expires_at) == (stored.claims, stored.expires_at)
    assert prompt.at_hand(TokenWant(ORG, "main")) is token
    fleet.clock.advance(1.5)
    await late.load([ORG])
    assert late.at_hand(TokenWant(ORG, "main")) is None
    assert fleet.issuer.count() == requests


async def test_without_the_issuers_keys_no_token_is_at_hand(fleet: Fleet) -> None:
    stored = await fleet.start().ensure(TokenWant(ORG, "main"))
    tokens = fleet.start()
    await tokens.load([ORG])
    await tokens.look_up([want(ORG)])

    assert tokens.at_hand(TokenWant(ORG, "main")) is None
    assert (await tokens.ensure(TokenWant(ORG, "main"))).token.reveal() == stored.token.reveal()
    assert fleet.issuer.count() == 1


async def test_a_looked_up_token_of_a_retired_credential_is_not_used(fleet: Fleet) -> None:
    await fleet.start().ensure(TokenWant(ORG, "main"))
    tokens = await looked_up_by(fleet, ORG)
    requests = fleet.issuer.count()
    fleet.credentials.add(ORG, "client-b", "secret-b")
    del fleet.credentials.orgs[ORG.id][1:]
    fleet.issuer.add(App("org_a", "client-b", "secret-b"))
    tokens._generations.forget(ORG.id)
    await tokens.load([ORG])

    assert tokens.at_hand(TokenWant(ORG, "main")) is None
    assert (await tokens.ensure(TokenWant(ORG, "main"))).claims.client_id == "client-b"
    assert fleet.issuer.count() == requests + 1


async def test_a_token_that_lacks_a_scope_is_looked_up_and_refused(
    fleet: Fleet, emitted: list[Emitted]
) -> None:
    """Reported as ever, and only then."""
    await fleet.start().ensure(TokenWant(ORG, "main"))
    [row] = fleet.rows.rows.values()
    tokens = await looked_up_by(fleet)
    wider = want(ORG)._replace(scopes=frozenset({"write:all"}))
    request = TokenRequest("main", ORG, AUDIENCE, wider.scopes)
    await tokens.load([ORG])
    assert row.token is not None
    [credential] = fleet.credentials.orgs[ORG.id]
    text = fleet.ring.open_token(
        row.token.sealed,
        row.token.key_id,
        shared_module._place(request._replace(scopes=frozenset()), credential),
    )
    assert text is not None
    sealed, key_id = fleet.ring.seal_token(text, shared_module._place(request, credential))
    token_of_wider = replace(row.token, sealed=sealed, key_id=key_id)
    await FakeStore(fleet.rows, "another").put(request, token_of_wider)
    await tokens.look_up([wider])

    assert tokens.at_hand(TokenWant(ORG, "main", scopes=wider.scopes)) is None
    assert [seen for seen in emitted if seen.event.name == "token.refused"] == []
    with pytest.raises(RequestRejected, match="invalid_scope"):
        await tokens.ensure(TokenWant(ORG, "main", scopes=wider.scopes))
    assert [seen.fields["reason"] for seen in emitted if seen.event.name == "token.refused"] == [
        "scope_missing"
    ]


async def test_what_is_not_stored_needs_no_second_look(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reservation holds only if nothing was stored since the look."""
    tokens = await looked_up_by(fleet, ORG)
    requests = fleet.issuer.count()
    looks: list[TokenRequest] = []
    find = FakeStore.find

    async def counted(self: FakeStore, request: TokenRequest) -> shared_module.Found:
        looks.append(request)
        return await find(self, request)

    monkeypatch.setattr(FakeStore, "find", counted)
    another = await fleet.start().ensure(TokenWant(ORG, "main"))
    assert len(looks) == 1

    taken = await fleet.until(asyncio.ensure_future(tokens.ensure(TokenWant(ORG, "main"))))

    assert taken.token.reveal() == another.token.reveal()
    assert len(looks) == 2
    assert fleet.issuer.count() == requests + 1


async def test_without_the_seal_of_its_org_a_swapped_row_would_reach_enforcement(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: sealed without a place the row opens, and only enforcement still stops it."""
    monkeypatch.setattr(shared_module, "_place", lambda request, credential: [])
    other = fleet.add_org(1)
    await fleet.start().ensure(TokenWant(other, "main"))
    stolen = fleet.rows.one()
    await fleet.start().ensure(TokenWant(ORG, "main"))
    mine = next(row for row in fleet.rows.rows.values() if row is not stolen)
    assert mine.token is not None and stolen.token is not None
    mine.token = replace(mine.token, sealed=stolen.token.sealed)
    opened_tokens: list[str] = []
    enforce = Acquirer.enforce

    async def watched(self: object, request: object, granted: object, **rest: object) -> Enforced:
        try:
            return await enforce(self, request, granted, **rest)  # type: ignore[arg-type]
        except TokenRefused as refused:
            opened_tokens.append(refused.reason)
            raise

    monkeypatch.setattr("worker.tokens.acquirer.Acquirer.enforce", watched)

    token = await fleet.start().ensure(TokenWant(ORG, "main"))

    assert opened_tokens == ["org_mismatch"]
    assert token.claims.org_code == "org_a"


async def test_a_token_older_than_a_definition_allows_is_not_taken(fleet: Fleet) -> None:
    """`max_claims_age` counts from when the token was received, in whatever process."""
    await fleet.start().ensure(TokenWant(ORG, "main"))
    fleet.clock.advance(301)

    await fleet.start().ensure(TokenWant(ORG, "main", max_age=timedelta(minutes=5)))

    assert fleet.issuer.count() == 2


async def test_fresh_requests_a_new_token_for_all(fleet: Fleet) -> None:
    """After a 401 the stored token is worth nothing; the new one is stored."""
    first, second = fleet.start(), fleet.start()
    await first.ensure(TokenWant(ORG, "main"))
    fleet.clock.advance(60)
    minted = await first.ensure(TokenWant(ORG, "main", fresh=True))

    served = await second.ensure(TokenWant(ORG, "main"))

    assert fleet.issuer.count() == 2
    assert served.token.reveal() == minted.token.reveal()


@pytest.mark.parametrize(
    ("scopes", "claims", "stays"),
    [
        # The older token does not show that the org has fewer rights now.
        (frozenset({"read:kb"}), {"scope": "", "scp": []}, False),
        # A fault of the issuer says nothing about the older token.
        (frozenset(), {"iss": "https://elsewhere.example"}, True),
    ],
    ids=["without a right", "invalid"],
)
async def test_a_refused_renewal_deletes_the_stored_token_if_it_lacks_a_right(
    fleet: Fleet, scopes: frozenset[str], claims: dict[str, Any], stays: bool
) -> None:
    tokens = fleet.start()
    await tokens.ensure(TokenWant(ORG, "main", scopes=scopes))
    fleet.clock.advance(60)
    fleet.app.replace = claims
    with pytest.raises(TokenRefused):
        await tokens.ensure(TokenWant(ORG, "main", scopes=scopes, fresh=True))

    assert (fleet.rows.one().token is not None) is stays


async def test_a_failed_request_leaves_no_reservation(fleet: Fleet) -> None:
    """The next process need not wait for it."""
    fleet.issuer.answer = lambda form: httpx.Response(400, json={"error": "invalid_request"})
    with pytest.raises(RequestRejected):
        await fleet.start().ensure(TokenWant(ORG, "main"))

    assert fleet.rows.one().reserved_until == 0.0


async def test_without_the_database_each_process_requests_its_own(fleet: Fleet) -> None:
    """A long run needs its token renewed also while the database is away."""
    fleet.rows.fault = StoreUnavailable("the database is away")
    for _ in range(2):
        await fleet.start().ensure(TokenWant(ORG, "main"))

    assert fleet.issuer.count() == 2


async def test_after_claims_were_refused_the_next_run_gets_a_new_token(fleet: Fleet) -> None:
    """In any process: the property may have been corrected. Not more often than once a minute."""
    tokens = fleet.start()
    await tokens.ensure(TokenWant(ORG, "main"))
    await tokens.outdate(want(ORG))
    fleet.app.properties = {"plan": "gold"}
    fleet.clock.advance(5)

    assert (await fleet.start().ensure(TokenWant(ORG, "main"))).claims.properties == {"plan": "gold"}
    assert (await tokens.ensure(TokenWant(ORG, "main"))).claims.properties == {"plan": "gold"}
    assert fleet.issuer.count() == 2
    for _ in range(6):
        await tokens.outdate(want(ORG))
        await tokens.ensure(TokenWant(ORG, "main"))
        fleet.clock.advance(13)
    assert fleet.issuer.count() == 3
    await tokens.outdate(want(OrgRef(OrgId("nobody"), "nobody")))


async def test_an_outdated_token_serves_until_a_new_one_comes(fleet: Fleet) -> None:
    tokens = fleet.start()
    old = await tokens.ensure(TokenWant(ORG, "main"))
    await tokens.outdate(want(ORG))
    fleet.issuer.answer = lambda form: httpx.Response(503)

    waiting = asyncio.ensure_future(tokens.ensure(TokenWant(ORG, "main")))
    assert (await fleet.until(waiting)).token.reveal() == old.token.reveal()


async def prepare(tokens: Tokens, covers: float, of: OrgRef = ORG) -> float | None:
    return await tokens.prepare(TokenWant(of, "main", covers=covers))


async def test_a_token_is_prepared_for_a_run_of_any_process(fleet: Fleet) -> None:
    """The run finds it, and requests nothing."""
    assert await prepare(fleet.start(), covers=900) is None
    fleet.clock.advance(900)

    await fleet.start().ensure(TokenWant(ORG, "main"))

    assert fleet.issuer.count() == 1


async def test_a_token_that_covers_the_run_is_left(fleet: Fleet) -> None:
    fleet.app.lifetime = 3600
    await fleet.start().ensure(TokenWant(ORG, "main"))

    assert await prepare(fleet.start(), covers=3000) is None
    assert fleet.issuer.count() == 1
    fleet.clock.advance(600)
    assert await prepare(fleet.start(), covers=3000) is None
    assert fleet.issuer.count() == 2


async def test_stored_tokens_that_cover_the_runs_are_found_without_credentials(fleet: Fleet) -> None:
    """Those of a full hour are looked up together, and no secret is opened."""
    fleet.app.lifetime = 3600
    await fleet.start().ensure(TokenWant(ORG, "main"))
    tokens = fleet.start()
    wants = [TokenWant(ORG, "main", covers=covers) for covers in (3000.0, 3599.0)]
    other = TokenWant(org(2), "main", covers=10.0)
    unknown = TokenWant(ORG, "nowhere", covers=10.0)
    fleet.credentials.reads = 0

    assert await tokens.not_covered([*wants, other, unknown]) == [wants[1], other]
    assert fleet.credentials.reads == 0


async def test_no_token_is_prepared_longer_ahead_than_it_lives(fleet: Fleet) -> None:
    """One that expires before the run would be requested in vain."""
    fleet.app.lifetime = 300
    tokens = fleet.start()
    await tokens.ensure(TokenWant(ORG, "main"))

    again = await prepare(tokens, covers=600)

    assert fleet.issuer.count() == 1
    assert again is not None and 300 < again < 600
    fleet.clock.advance(again)
    assert await prepare(tokens, covers=600 - again) is None
    fleet.clock.advance(600 - again)
    await tokens.ensure(TokenWant(ORG, "main"))
    assert fleet.issuer.count() == 2


async def test_nothing_is_prepared_for_a_parked_org(fleet: Fleet) -> None:
    tokens = fleet.start()
    fleet.issuer.answer = lambda form: httpx.Response(400, json={"error": "invalid_request"})
    with pytest.raises(RequestRejected):
        await tokens.ensure(TokenWant(ORG, "main"))
    fleet.clock.advance(60)

    assert await prepare(tokens, covers=600) is None
    assert fleet.issuer.count() == 1


async def test_what_fails_ahead_of_time_is_left_to_the_run(fleet: Fleet) -> None:
    fleet.issuer.answer = lambda form: httpx.Response(503)
    waiting = asyncio.ensure_future(prepare(fleet.start(), covers=600))
    while not waiting.done():
        await fleet.clock.pass_time(1)

    assert waiting.result() is None
    assert fleet.rows.one().reserved_until == 0.0


async def test_a_run_that_needs_the_token_meanwhile_shares_the_request(fleet: Fleet) -> None:
    """And the other way around: neither waits for the other for ever."""
    gate = fleet.issuer.hold()
    tokens = fleet.start()
    ahead = asyncio.ensure_future(prepare(tokens, covers=600))
    await settle(20)
    run = asyncio.ensure_future(tokens.ensure(TokenWant(ORG, "main")))
    await settle(20)
    again = asyncio.ensure_future(prepare(tokens, covers=600))
    await settle(20)
    gate.set()

    assert (await run).claims.org_code == "org_a"
    assert (await ahead, await again) == (None, None)
    assert fleet.issuer.count() == 1


async def test_a_run_and_what_is_ahead_of_it_share_no_reservation(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either would end that of the other, and a second process would request a token too."""
    gate, asked, real = asyncio.Event(), list[int](), FakeStore.reserve

    async def reserve(self: FakeStore, request: TokenRequest, version: int, seconds: float) -> bool:
        asked.append(version)
        await gate.wait()
        return await real(self, request, version, seconds)

    monkeypatch.setattr(FakeStore, "reserve", reserve)
    tokens = fleet.start()
    ahead = asyncio.ensure_future(prepare(tokens, covers=600))
    await settle(20)
    run = asyncio.ensure_future(tokens.ensure(TokenWant(ORG, "main")))
    await settle(20)

    assert asked == [0]
    gate.set()
    assert (await fleet.until(run)).claims.org_code == "org_a"
    assert await ahead is None
    assert fleet.issuer.count() == 1


async def test_requests_of_runs_pass_those_ahead_of_time(fleet: Fleet) -> None:
    """At one request a second; and a run that needs the very token need not wait behind all others."""
    orgs = [fleet.add_org(number) for number in range(1, 25)]
    tokens = fleet.start()
    first = [asyncio.ensure_future(prepare(tokens, 600, of)) for of in orgs[:16]]
    await settle(50)
    runs = [asyncio.ensure_future(tokens.ensure(TokenWant(of, "main"))) for of in orgs[16:]]
    await settle(50)
    hurried = asyncio.ensure_future(tokens.ensure(TokenWant(orgs[15], "main")))
    for _ in range(200):
        await fleet.clock.pass_time(0.1)
        if hurried.done():
            break
    sent = [form["client_id"] for _, path, form in fleet.issuer.requests if path == "/oauth2/token"]

    assert all(one.done() for one in runs)
    assert sent.index("client-16") < len(sent)
    assert set(sent[10:19]) == {f"client-{number}" for number in range(16, 25)}
    while not all(one.done() for one in first):
        await fleet.clock.pass_time(0.5)
    assert fleet.issuer.count() == len(orgs)


async def test_several_workers_share_the_rate(fleet: Fleet) -> None:
    """`max_requests_per_second` holds for all of them together."""
    orgs = [fleet.add_org(number) for number in range(1, 41)]
    workers = [fleet.start() for _ in range(2)]
    for tokens in workers:
        tokens.share(2)
    began = fleet.clock.monotonic()
    waiting = [
        asyncio.ensure_future(workers[number % 2].ensure(TokenWant(of, "main")))
        for number, of in enumerate(orgs)
    ]
    while not all(one.done() for one in waiting):
        await fleet.clock.pass_time(0.1)

    # Ten a second: one second of them at once, the others in the three seconds after it.
    assert fleet.clock.monotonic() - began >= 3.0
    assert fleet.issuer.count() == len(orgs)


@pytest.mark.parametrize(("left", "waits"), [("2", True), ("50", False)])
async def test_the_rest_of_what_the_issuer_allows_is_kept_for_runs(
    fleet: Fleet, left: str, waits: bool
) -> None:
    """As RateLimit-Remaining of RateLimit-Limit says, until RateLimit-Reset."""
    tokens = fleet.start()

    def answer(form: dict[str, str]) -> httpx.Response:
        response = fleet.issuer.grant(form)
        response.headers.update(
            {"RateLimit-Limit": "100", "RateLimit-Remaining": left, "RateLimit-Reset": "30"}
        )
        return response

    fleet.issuer.answer = answer
    assert tokens.ahead_in("main") == 0
    await tokens.ensure(TokenWant(ORG, "main"))
    fleet.clock.advance(2)

    assert tokens.ahead_in("main") == pytest.approx(28 if waits else 0)
    assert tokens.ahead_in("unknown") == 0


@pytest.mark.parametrize(("memory", "verified"), [(MEMORY, 30), (10_000, 90)], ids=["all", "few"])
async def test_a_token_is_verified_once_in_a_process_while_it_is_in_memory(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, memory: int, verified: int
) -> None:
    """One that had to go is read from the table and verified again; none is requested."""
    orgs = [fleet.add_org(number) for number in range(30)]
    first = fleet.start()
    for each in orgs:
        await fleet.until(asyncio.ensure_future(first.ensure(TokenWant(each, "main"))))
    enforced: list[str] = []
    enforce = Acquirer.enforce

    async def counted(self: Acquirer, request: TokenRequest, *rest: Any, **more: Any) -> Enforced:
        enforced.append(request.org.code)
        return await enforce(self, request, *rest, **more)

    monkeypatch.setattr(Acquirer, "enforce", counted)
    second = fleet.start(memory=memory)
    for _ in range(3):
        await second.load(orgs)
        for each in orgs:
            await second.ensure(TokenWant(each, "main"))
        fleet.clock.advance(60)

    assert len(enforced) == verified
    assert fleet.issuer.count() == len(orgs)
    assert second._tokens.bytes <= memory
