"""The cache: one request for many, early renewal, and what is served while the issuer is away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import httpx
import pytest

from tests.fakes.clock import settle
from tests.fakes.issuer import ORG, App, jwk
from tests.unit.tokens.conftest import World
from worker.errors import CredentialsRejected, IssuerUnavailable, StoreUnavailable, TokenRefused
from worker.guard.http import Reply
from worker.ids import ALL_ORGS
from worker.model.orgs import TokenWant
from worker.telemetry.masking import masker
from worker.tokens import issuer_client
from worker.tokens.issuer_client import IssuerClient


async def test_a_token_is_asked_for_as_kinde_takes_it(world: World) -> None:
    """Form body with the secret in it, the audience, and the scopes that are needed."""
    enforced = await world.ensure(scopes=frozenset({"read:kb"}))

    form = world.issuer.requests[0][2]
    assert form == {
        "grant_type": "client_credentials",
        "client_id": "client-a",
        "client_secret": "secret-a",
        "audience": "https://api.acme.com",
        "scope": "read:kb",
    }
    assert enforced.claims.org_code == "org_a"
    assert enforced.claims.scopes == {"read:kb"}
    assert world.credentials.uses == [("org_a-1", None)]


async def test_two_hundred_runs_of_one_org_make_one_request(world: World) -> None:
    """A cold cache asks once, for all who wait."""
    answers = await asyncio.gather(*(world.ensure() for _ in range(200)))

    assert world.issuer.count() == 1
    assert len({enforced.token.reveal() for enforced in answers}) == 1


async def test_a_cancelled_waiter_does_not_end_the_request(world: World) -> None:
    """The first who asks may be cancelled: the others still get the token."""
    gate = world.issuer.hold()
    first, second = asyncio.ensure_future(world.ensure()), asyncio.ensure_future(world.ensure())
    await settle()
    first.cancel()
    await settle()
    gate.set()

    assert (await second).claims.org_code == "org_a"
    assert first.cancelled()
    assert world.issuer.count() == 1


async def test_a_token_is_renewed_beside_its_use_before_it_expires(world: World) -> None:
    """Early renewal delays nobody: the old token serves while the new one comes."""
    old = await world.ensure()
    world.clock.advance(timedelta(hours=23))

    served = await world.ensure()
    await settle(100)
    renewed = await world.ensure()

    assert served is old
    assert renewed is not old
    assert world.issuer.count() == 2


async def test_a_token_in_its_last_seconds_is_not_handed_out(world: World) -> None:
    """A run gets a token with some life left."""
    world.app.lifetime = 100
    old = await world.ensure()
    world.clock.advance(85)

    assert await world.ensure() is not old


async def test_a_token_of_twenty_seconds_can_be_used(world: World) -> None:
    """A short life leaves a share of it, not nothing."""
    world.app.lifetime = 20
    for _ in range(60):
        enforced = await world.ensure()
        assert (enforced.token.expires_at - world.clock.now()).total_seconds() >= 4
        world.clock.advance(1)
        await settle(50)

    assert world.issuer.count() <= 7


async def test_a_wall_clock_set_back_keeps_no_token_alive(world: World) -> None:
    """The life of a token is counted on the monotonic clock as well."""
    world.app.lifetime = 100
    old = await world.ensure()
    started = world.clock.now()
    world.clock.advance(101)
    world.clock.set(started)

    assert await world.ensure() is not old


async def test_valid_tokens_serve_while_the_issuer_is_away(world: World) -> None:
    """An outage is felt only by who has no token."""
    world.app.lifetime = 600
    old = await world.ensure()
    world.clock.advance(595)
    world.issuer.answer = lambda form: httpx.Response(503)

    waiting = asyncio.ensure_future(world.ensure())
    while not waiting.done():
        await world.clock.pass_time(1)

    assert waiting.result() is old


async def test_claims_older_than_a_definition_allows_are_asked_for_again(world: World) -> None:
    """A flag flipped at the provider is seen by the next run once `max_claims_age` has passed."""
    age = timedelta(minutes=5)
    await world.ensure(max_age=age)
    world.app.flags = {"agent-v2": {"t": "b", "v": True}}
    world.clock.advance(299)
    assert not (await world.ensure(max_age=age)).claims.flags

    world.clock.advance(1)
    answers = await asyncio.gather(*(world.ensure(max_age=age) for _ in range(20)))

    assert all(enforced.claims.flags["agent-v2"].value is True for enforced in answers)
    assert world.issuer.count() == 2


async def test_a_definition_cannot_ask_for_claims_newer_than_a_minute(world: World) -> None:
    """The floor protects the issuer's budget."""
    await world.ensure(max_age=timedelta(seconds=1))
    world.clock.advance(59)
    await world.ensure(max_age=timedelta(seconds=1))

    assert world.issuer.count() == 1


async def test_fresh_mints_a_new_token_even_at_once(world: World) -> None:
    """After a 401 the token at hand is worth nothing, however new it is."""
    old = await world.ensure()
    renewed = await world.ensure(fresh=True)

    assert renewed.token.reveal() != old.token.reveal()
    assert await world.ensure() is renewed


async def test_a_token_of_another_org_is_refused_each_time_and_never_cached(
    world: World, emitted: list
) -> None:
    """Refused means asked again the next time: nothing of it is kept."""
    world.app.org_code = "org_b"
    for _ in range(3):
        with pytest.raises(TokenRefused) as refused:
            await world.ensure()
        assert (refused.value.reason, refused.value.detail) == ("org_mismatch", "other_org")
    world.app.org_code = "org_a"

    assert (await world.ensure()).claims.org_code == "org_a"
    assert world.issuer.count() == 4
    assert [seen.event.name for seen in emitted].count("token.refused") == 3


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"org_code": None}, "org_mismatch", "org_missing"),
        ({"org_code": "ORG_A"}, "org_mismatch", "other_org"),
        ({"org_code": ["org_a"]}, "token_invalid", "org_type"),
        ({"azp": "client-b"}, "client_mismatch", "other_client"),
        ({"azp": None}, "client_mismatch", "client_missing"),
        ({"scope": "write:kb"}, "scope_missing", "read:kb"),
        ({"scope": None}, "scope_missing", "read:kb"),
        ({"iss": "https://evil.kinde.com"}, "token_invalid", "issuer"),
        ({"aud": ["https://api.other.com"]}, "token_invalid", "audience"),
        ({"exp": 1}, "token_invalid", "expired"),
    ],
)
async def test_a_token_that_does_not_hold_is_refused_with_its_reason(
    world: World, change: dict, reason: str, detail: str
) -> None:
    """Each reason is one of a run's reasons, and the detail says which claim."""
    world.app.replace = change

    with pytest.raises(TokenRefused) as refused:
        await world.ensure(scopes=frozenset({"read:kb"}))

    assert (refused.value.reason, refused.value.detail) == (reason, detail)


async def test_a_token_signed_by_another_key_under_a_known_kid_is_refused(world: World) -> None:
    """The kid says which key to use, not that it was used."""
    world.issuer.keys = lambda: httpx.Response(200, json={"keys": [jwk("k2", kid="k1")]})

    with pytest.raises(TokenRefused) as refused:
        await world.ensure()

    assert refused.value.detail == "signature"


async def test_a_lost_scope_takes_the_older_token_with_it(world: World) -> None:
    """When the issuer says that an org may do less now, the token that says more goes."""
    await world.ensure(scopes=frozenset({"read:kb"}))
    world.app.replace = {"scope": "write:kb"}

    for fresh in (True, False):
        with pytest.raises(TokenRefused):
            await world.ensure(scopes=frozenset({"read:kb"}), fresh=fresh)


async def test_scopes_of_variants_are_asked_for_and_may_be_missing(world: World) -> None:
    """An org without a variant's scope still gets the definition's own."""
    world.app.scopes = ("read:kb",)

    enforced = await world.ensure(scopes=frozenset({"read:kb"}), also_ask=frozenset({"write:kb"}))

    asked = [form["scope"] for _, path, form in world.issuer.requests if path == "/oauth2/token"]
    assert asked == ["read:kb write:kb", "read:kb"]
    assert enforced.claims.scopes == {"read:kb"}


async def test_tokens_of_different_scopes_and_audiences_are_kept_apart(world: World) -> None:
    """A token asked for with less never serves who needs more."""
    await world.ensure(scopes=frozenset({"read:kb"}))
    await world.ensure(scopes=frozenset({"write:kb"}))
    world.app.replace = {"aud": ["https://other"]}
    await world.ensure(scopes=frozenset({"read:kb"}), audience="https://other")

    assert world.issuer.count() == 3


async def test_a_retired_generation_takes_its_tokens_with_it(world: World) -> None:
    """What was leaked with a retired secret is dropped within two seconds."""
    old = await world.ensure()
    world.app.client_id = "client-new"
    world.issuer.add(App("org_a", "client-new", "secret-new"))
    world.credentials.add(ORG, "client-new", "secret-new")
    del world.credentials.orgs[ORG.id][1]
    world.clock.advance(2)

    new = await world.ensure()

    assert new is not old
    assert new.claims.client_id == "client-new"


async def test_a_dropped_org_is_asked_for_again(world: World) -> None:
    """Suspending an org drops its tokens, and no other's."""
    other = world.add_org(1)
    await world.ensure()
    kept = await world.ensure(other)
    world.tokens.drop(ORG.id)

    await world.ensure()

    assert world.issuer.count() == 3
    assert await world.ensure(other) is kept


async def test_an_org_without_a_credential_is_told_what_to_do(world: World) -> None:
    """No request is made, and the message says how to add one."""
    world.credentials.orgs.clear()

    with pytest.raises(CredentialsRejected) as rejected:
        await world.ensure()

    assert "credentials add org_a" in rejected.value.fix
    assert rejected.value.retry_after
    assert world.issuer.requests == []


async def test_a_database_that_is_away_does_not_stop_live_tokens(world: World) -> None:
    """The credentials known last serve while they cannot be read."""
    enforced = await world.ensure()
    world.clock.advance(60)
    world.credentials.fault = StoreUnavailable("away")

    assert await world.ensure() is enforced


async def test_secret_and_token_are_masked_and_have_no_readable_form(world: World) -> None:
    """Both are registered before anyone gets the token, and neither repr shows them."""
    enforced = await world.ensure()
    text = enforced.token.reveal()

    assert masker.mask(f"a {text} b secret-a c", ALL_ORGS) == "a [masked] b [masked] c"
    shown = repr([enforced, enforced.token, world.credentials.orgs])
    assert text not in shown
    assert "secret-a" not in shown


async def test_the_cache_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token used longest ago goes first."""
    monkeypatch.setattr(world.tokens._tokens, "_size", lambda enforced: 10)
    monkeypatch.setattr(world.tokens._tokens, "_limit", 20)
    others = [world.add_org(number) for number in range(2)]
    for of in (ORG, *others):
        await world.ensure(of)

    await world.ensure(others[0])
    assert world.issuer.count() == 3
    await world.ensure()
    assert world.issuer.count() == 4


async def test_a_token_under_a_key_published_late_waits_and_is_not_asked_for_again(world: World) -> None:
    """Key rotation, published 5 s late: no verdict, one token, at most 4 key fetches."""
    await world.ensure()
    world.issuer.key = "k2"
    world.clock.advance(60)
    with pytest.raises(IssuerUnavailable) as waits:
        await world.ensure(fresh=True)
    assert waits.value.code == "key_not_published"
    assert 1 <= waits.value.retry_after <= 10

    world.clock.advance(5)
    world.issuer.published = ["k1", "k2"]
    world.clock.advance(waits.value.retry_after - 5)
    renewed = await world.ensure(fresh=True)

    assert renewed.claims.org_code == "org_a"
    assert world.issuer.count() == 2
    assert world.issuer.count("/.well-known/jwks") <= 4


async def test_a_token_that_expires_before_its_key_is_published_is_no_ones_fault(world: World) -> None:
    """`exp` has whole seconds: the last may have passed while the token is younger than it is valid."""
    world.issuer.add(App("org_a", "client-a", "secret-a", lifetime=10))
    world.issuer.key = "k2"
    world.clock.advance(0.6)
    with pytest.raises(IssuerUnavailable):
        await world.ensure()
    world.issuer.published = ["k1", "k2"]
    world.clock.advance(9.6)

    enforced = await world.ensure()

    assert enforced.claims.expires_at > world.clock.now()
    assert world.issuer.count() == 2


async def test_a_token_that_expires_while_the_worker_stands_still_is_no_ones_fault(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.issuer.add(App("org_a", "client-a", "secret-a", lifetime=60))
    verify = IssuerClient.verify

    async def stopped(client: IssuerClient, text: str, audience: str) -> Mapping[str, Any]:
        if world.issuer.count() == 1:
            world.clock.advance(60)
        return await verify(client, text, audience)

    monkeypatch.setattr(IssuerClient, "verify", stopped)

    enforced = await world.ensure()

    assert enforced.claims.expires_at > world.clock.now()
    assert world.issuer.count() == 2


async def test_a_worker_that_stands_still_again_and_again_gets_no_verdict(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.issuer.add(App("org_a", "client-a", "secret-a", lifetime=60))
    verify = IssuerClient.verify

    async def stopped(client: IssuerClient, text: str, audience: str) -> Mapping[str, Any]:
        if world.issuer.count() <= 2:
            world.clock.advance(60)
        return await verify(client, text, audience)

    monkeypatch.setattr(IssuerClient, "verify", stopped)

    with pytest.raises(IssuerUnavailable, match="expired before they were verified"):
        await world.ensure()
    assert (await world.ensure()).claims.expires_at > world.clock.now()


async def test_a_token_that_expires_while_its_response_waits_to_be_read_is_no_ones_fault(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.issuer.add(App("org_a", "client-a", "secret-a", lifetime=60))
    send = issuer_client.exchange

    async def stopped(*args: Any, **keys: Any) -> Reply | str:
        reply = await send(*args, **keys)
        if world.issuer.count() == 1:
            world.clock.advance(60)
        return reply

    monkeypatch.setattr(issuer_client, "exchange", stopped)

    enforced = await world.ensure()

    assert enforced.claims.expires_at > world.clock.now()
    assert world.issuer.count() == 2


async def test_a_kid_that_is_never_published_is_refused_after_a_minute(world: World) -> None:
    """After 60 s from its first sight an unknown kid is a verdict."""
    await world.ensure()
    world.issuer.key = "k9"
    for _ in range(6):
        with pytest.raises(IssuerUnavailable):
            await world.ensure(fresh=True)
        world.clock.advance(10)

    with pytest.raises(TokenRefused) as refused:
        await world.ensure(fresh=True)
    assert (refused.value.reason, refused.value.detail) == ("token_invalid", "unknown_kid")
    assert (await world.ensure()).claims.org_code == "org_a"  # the older one still holds


async def test_an_unknown_kid_is_no_verdict_while_the_key_set_cannot_be_read(world: World) -> None:
    """The set that was read in its first minute does not tell that the key was never published."""
    await world.ensure()
    world.issuer.key = "k2"
    world.clock.advance(60)
    with pytest.raises(IssuerUnavailable):
        await world.ensure(fresh=True)
    world.issuer.published, world.issuer.keys = ["k1", "k2"], lambda: httpx.Response(503)
    world.clock.advance(70)

    with pytest.raises(IssuerUnavailable):
        await world.ensure(fresh=True)
    world.issuer.keys = None
    world.clock.advance(10)

    assert (await world.ensure(fresh=True)).claims.org_code == "org_a"


async def test_an_api_that_refuses_every_token_does_not_use_up_the_budget(world: World) -> None:
    """A token minted a moment ago serves whoever wants a fresh one."""
    await world.ensure()
    for _ in range(50):
        await world.ensure(fresh=True)
    assert world.issuer.count() == 2

    world.clock.advance(2)
    await world.ensure(fresh=True)
    assert world.issuer.count() == 3


async def test_a_renewal_that_is_refused_is_not_repeated_at_once(world: World) -> None:
    """The older token holds, and the issuer is left alone for a minute."""
    old = await world.ensure()
    world.app.replace = {"aud": ["other"]}
    world.clock.advance(timedelta(hours=22))
    for _ in range(20):
        assert (await world.ensure()).token is old.token
        await settle(50)
    assert world.issuer.count() == 2

    world.clock.advance(60)
    await world.ensure()
    await settle(50)
    assert world.issuer.count() == 3


async def test_a_secret_replaced_in_its_file_keeps_live_tokens(world: World) -> None:
    """The generation is the same: what it brought still holds."""
    old = await world.ensure()
    world.credentials.orgs.clear()
    world.credentials.add(ORG, "client-a", "not-valid-yet")
    world.clock.advance(60)

    assert await world.ensure() is old


async def test_a_token_is_at_hand_only_while_nothing_needs_to_be_asked(world: World) -> None:
    """Without a request: not for other scopes, not unconfirmed, not when it must be renewed."""
    scopes = frozenset({"read:kb"})
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes)) is None
    assert world.issuer.count() == 0

    enforced = await world.ensure(scopes=scopes)
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes)) is enforced
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes | {"write:kb"})) is None
    assert world.tokens.at_hand(TokenWant(ORG, "other", scopes=scopes)) is None

    world.clock.advance(timedelta(seconds=2))
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes)) is None
    assert await world.ensure(scopes=scopes) is enforced
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes)) is enforced

    world.clock.advance(timedelta(minutes=10))
    await world.ensure(scopes=scopes)
    age = timedelta(minutes=5)
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes, max_age=age)) is None

    world.clock.advance(timedelta(hours=23))
    assert await world.ensure(scopes=scopes) is enforced
    assert world.tokens.at_hand(TokenWant(ORG, "main", scopes=scopes)) is None


async def test_a_token_of_a_retired_generation_is_not_at_hand(world: World) -> None:
    await world.ensure()
    world.credentials.add(ORG, "client-a", "secret-b")
    del world.credentials.orgs[ORG.id][1]
    world.clock.advance(timedelta(seconds=2))
    await world.tokens.load([ORG])

    assert world.tokens.at_hand(TokenWant(ORG, "main")) is None
