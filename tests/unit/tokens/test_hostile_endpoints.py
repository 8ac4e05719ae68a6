"""Hostile endpoints: whatever they answer, tries are bounded, the secret stays here, and others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import ORG, URL, App, FakeCredentials, FakeIssuer, jwk, kinde_issuer, org, profile
from tests.unit.tokens.conftest import World
from worker.errors import IssuerUnavailable, WorkerError
from worker.guard.endpoints import Endpoints
from worker.model.orgs import TokenWant
from worker.outbound import open_client
from worker.tokens.cache import Tokens

Reply = Callable[[], Any]


def body(**changes: Any) -> Reply:
    """A token response with other members; a change to None leaves one out."""
    good = {"access_token": "a.b.c", "token_type": "bearer", "expires_in": 86400}
    members = {name: value for name, value in (good | changes).items() if value is not None}
    return lambda: httpx.Response(200, content=json.dumps(members).encode())


class Drip(httpx.AsyncByteStream):
    """A body that never ends; with a clock, a byte a second."""

    def __init__(self, clock: ManualClock | None = None) -> None:
        self._clock = clock

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            if self._clock is not None:
                await self._clock.sleep(1)
                yield b" "
            else:
                yield b" " * 65536


async def hang() -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


def raises(error: Exception) -> Reply:
    def reply() -> httpx.Response:
        raise error

    return reply


TOKEN_ENDPOINTS: dict[str, Reply] = {
    "HTML": lambda: httpx.Response(200, text="<html>welcome</html>"),
    "a list": lambda: httpx.Response(200, json=[]),
    "an empty object": lambda: httpx.Response(200, json={}),
    "nothing": lambda: httpx.Response(200),
    "duplicate members": lambda: httpx.Response(
        200, content=b'{"access_token":"a","access_token":"b","token_type":"bearer"}'
    ),
    "50 MB": lambda: httpx.Response(200, stream=Drip()),
    "a compressed answer": lambda: httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Drip()),
    "a hang": hang,
    "a redirect to another host": lambda: httpx.Response(
        307, headers={"Location": "https://evil.example/oauth2/token"}
    ),
    "a redirect to http": lambda: httpx.Response(302, headers={"Location": "http://acme.kinde.com/"}),
    "expires_in -1": body(expires_in=-1),
    "expires_in 0": body(expires_in=0),
    "expires_in as text": body(expires_in="3600"),
    "expires_in 1e12": body(expires_in=1e12),
    "expires_in true": body(expires_in=True),
    "token_type mac": body(token_type="mac"),
    "no token_type": body(token_type=None),
    "a token with a line break": body(access_token="a.b\r\nX-Evil: 1"),
    "a token with a space": body(access_token="a b"),
    "a token that is a list": body(access_token=["a.b.c"]),
    "an empty token": body(access_token=""),
    "a token of 17 KiB": body(access_token="a" * 17_000),
    "status 201": lambda: httpx.Response(201, json={"access_token": "a.b.c", "token_type": "bearer"}),
    "status 204": lambda: httpx.Response(204),
    "status 404 with HTML": lambda: httpx.Response(404, text="<html>"),
    "status 500 with invalid_client": lambda: httpx.Response(500, json={"error": "invalid_client"}),
    "503 for ever": lambda: httpx.Response(503),
    "connection refused": raises(httpx.ConnectError("refused")),
    "connection cut": raises(httpx.RemoteProtocolError("cut")),
    "TLS that fails": raises(httpx.ConnectError("certificate verify failed")),
    "a read timeout": raises(httpx.ReadTimeout("slow")),
}


@pytest.mark.parametrize("name", TOKEN_ENDPOINTS)
async def test_a_token_endpoint_that_gives_no_token_makes_runs_wait(world: World, name: str) -> None:
    """Transient, a few tries, nothing sent elsewhere, nothing cached."""
    world.issuer.answer = lambda form: TOKEN_ENDPOINTS[name]()
    asking = asyncio.ensure_future(world.ensure())
    while not asking.done():
        await settle(30)
        await world.clock.pass_time(1)

    with pytest.raises(IssuerUnavailable) as unavailable:
        await asking
    assert unavailable.value.retry_after
    assert world.issuer.count() <= 3
    assert {str(request.url.host) for request in world.issuer.seen} == {"acme.kinde.com"}
    with pytest.raises(IssuerUnavailable):
        await world.ensure()
    assert world.issuer.count() <= 3


async def test_a_body_that_drips_is_cut_off(world: World) -> None:
    """Each byte in time does not make the whole in time."""
    world.issuer.answer = lambda form: httpx.Response(200, stream=Drip(world.clock))
    asking = asyncio.ensure_future(world.ensure())
    started = world.clock.monotonic()
    while not asking.done():
        await settle(30)
        await world.clock.pass_time(1)

    with pytest.raises(IssuerUnavailable):
        await asking
    assert world.clock.monotonic() - started < 40


async def test_an_expires_in_that_is_absent_is_taken_from_the_token(world: World) -> None:
    """Kinde may leave it out."""
    world.issuer.answer = lambda form: _without_expires_in(world.issuer.grant(form))

    enforced = await world.ensure()

    assert enforced.token.expires_at == enforced.claims.expires_at


async def test_an_expires_in_shorter_than_the_token_wins(world: World) -> None:
    """The smaller of the two."""
    world.issuer.answer = lambda form: _without_expires_in(world.issuer.grant(form), expires_in=60)

    enforced = await world.ensure()

    assert (enforced.token.expires_at - world.clock.now()).total_seconds() == 60


async def test_no_cookie_of_an_answer_travels_with_another_request(world: World) -> None:
    """One org's session must not become another's."""

    def with_cookie(form: dict[str, str]) -> httpx.Response:
        answer = world.issuer.grant(form)
        answer.headers["Set-Cookie"] = "session=org_a; Path=/"
        return answer

    world.issuer.answer = with_cookie
    other = world.add_org(1)
    await world.ensure()
    await world.ensure(other)

    assert all("cookie" not in request.headers for request in world.issuer.seen)


KEY_SETS: dict[str, Reply] = {
    "an empty set": lambda: httpx.Response(200, json={"keys": []}),
    "no keys member": lambda: httpx.Response(200, json={}),
    "a list": lambda: httpx.Response(200, json=[jwk()]),
    "keys that are text": lambda: httpx.Response(200, json={"keys": "k1"}),
    "HTML": lambda: httpx.Response(200, text="<html>"),
    "a symmetric key alone": lambda: _keys({"kty": "oct", "kid": "k1", "k": "c2VjcmV0"}),
    "a private key type unknown": lambda: _keys({"kty": "XYZ", "kid": "k1"}),
    "an RSA key of 512 bits": lambda: _keys(jwk(n="w" * 86)),
    "an RSA key with exponent 1": lambda: _keys(jwk(e="AQ")),
    "an encryption key": lambda: _keys(jwk(use="enc")),
    "a key for another algorithm": lambda: _keys(jwk(alg="RS512")),
    "a key for signing only": lambda: _keys(jwk(key_ops=["sign"])),
    "one kid for two keys": lambda: _keys(jwk("k1"), jwk("k2", kid="k1")),
    "no kid": lambda: _keys(jwk(kid=None)),
    "20,000 keys": lambda: _keys(*[jwk()] * 20_000),
    "101 keys": lambda: _keys(*[{"kty": "RSA", "kid": str(number)} for number in range(101)]),
    "a redirect": lambda: httpx.Response(301, headers={"Location": "https://evil.example/jwks"}),
    "status 500": lambda: httpx.Response(500),
    "a hang": hang,
    "a body without end": lambda: httpx.Response(200, stream=Drip()),
    "duplicate members": lambda: httpx.Response(200, content=b'{"keys": [], "keys": []}'),
}


def _keys(*entries: Any) -> httpx.Response:
    return httpx.Response(200, json={"keys": list(entries)})


@pytest.mark.parametrize("name", KEY_SETS)
async def test_a_key_set_that_is_no_good_replaces_no_good_one(world: World, name: str) -> None:
    """The last good set goes on serving, and a cold start waits: neither is ever a verdict."""
    enforced = await world.ensure()
    world.issuer.keys = lambda: KEY_SETS[name]()
    world.clock.advance(4000)  # the set is old now, and is read anew beside its use

    renewed = await world.ensure(fresh=True)
    await settle(50)
    await world.clock.pass_time(12)

    assert renewed.claims.org_code == enforced.claims.org_code
    assert (await world.ensure(fresh=True)).claims.org_code == "org_a"
    assert world.issuer.count("/.well-known/jwks") <= 3


@pytest.mark.parametrize("name", KEY_SETS)
async def test_a_key_set_that_was_never_good_is_no_verdict(world: World, name: str) -> None:
    """Bounded tries, and one token only."""
    world.issuer.keys = lambda: KEY_SETS[name]()
    started = world.clock.monotonic()
    while world.clock.monotonic() - started < 60:
        asking = asyncio.ensure_future(world.ensure())
        while not asking.done():
            await settle(20)
            await world.clock.pass_time(1)
        with pytest.raises(IssuerUnavailable):
            await asking
        await world.clock.pass_time(1)

    assert world.issuer.count() == 1
    assert world.issuer.count("/.well-known/jwks") <= 6
    assert {str(request.url.host) for request in world.issuer.seen} == {"acme.kinde.com"}


async def test_a_usable_key_beside_unusable_ones_is_used(world: World) -> None:
    """An entry that is no good is passed over (RFC 7517, section 5)."""
    odd = [{"kty": "oct", "kid": "k9", "k": "AA"}, 7, {"kty": "RSA"}, jwk("k2", n="AA")]
    world.issuer.keys = lambda: _keys(*odd, jwk())

    assert (await world.ensure()).claims.org_code == "org_a"


DISCOVERY: dict[str, Any] = {
    "of another issuer": {"issuer": "https://evil.example"},
    "of the issuer with a slash": {"issuer": URL + "/"},
    "without issuer": {"issuer": None},
    "a token endpoint elsewhere": {"token_endpoint": "https://evil.example/oauth2/token"},
    "a token endpoint without TLS": {"token_endpoint": "http://acme.kinde.com/oauth2/token"},
    "a token endpoint on another port": {"token_endpoint": "https://acme.kinde.com:8443/oauth2/token"},
    "a token endpoint with a user": {"token_endpoint": "https://a:b@acme.kinde.com/oauth2/token"},
    "keys elsewhere": {"jwks_uri": "https://evil.example/jwks"},
    "no token endpoint": {"token_endpoint": None},
    "a token endpoint that is a list": {"token_endpoint": [URL]},
}


def document(**changes: Any) -> dict[str, Any]:
    good = {"issuer": URL, "token_endpoint": f"{URL}/oauth2/token", "jwks_uri": f"{URL}/.well-known/jwks"}
    return {name: value for name, value in (good | changes).items() if value is not None}


def discovering(clock: ManualClock, answer: Callable[[httpx.Request], httpx.Response]) -> Endpoints:
    issuer = kinde_issuer(profile=profile(token="", keys=""))
    return Endpoints(issuer, open_client(httpx.MockTransport(answer)), clock=clock)


@pytest.mark.parametrize("name", DISCOVERY)
async def test_a_discovery_document_that_leads_elsewhere_is_not_followed(
    name: str, clock: ManualClock
) -> None:
    """The secret goes to the issuer's own origin or nowhere."""
    endpoints = discovering(clock, lambda request: httpx.Response(200, json=document(**DISCOVERY[name])))

    with pytest.raises(IssuerUnavailable):
        await endpoints.token()


async def test_a_discovered_endpoint_is_kept_while_the_document_cannot_be_read(clock: ManualClock) -> None:
    """The last good one serves; a failing endpoint is not asked in a loop."""
    answers = [httpx.Response(200, json=document())]
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answers[0]

    endpoints = discovering(clock, answer)
    assert await endpoints.token() == f"{URL}/oauth2/token"
    answers[0] = httpx.Response(500)
    clock.advance(4000)
    for _ in range(5):
        assert await endpoints.keys() == f"{URL}/.well-known/jwks"
        await settle()

    assert len(asked) == 2
    await endpoints.close()


async def test_nobody_waits_for_a_newer_discovery_document(clock: ManualClock) -> None:
    """It is read beside the use of the old one, once for all, also where it hangs."""
    answers = [httpx.Response(200, json=document())]
    asked: list[httpx.Request] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answers.pop() if answers else await hang()

    endpoints = Endpoints(
        kinde_issuer(profile=profile(token="", keys="")),
        open_client(httpx.MockTransport(answer)),
        clock=clock,
    )
    await endpoints.token()
    clock.advance(4000)
    for _ in range(5):
        asking = asyncio.ensure_future(endpoints.token())
        await settle()
        assert asking.done()

    assert len(asked) == 2
    await endpoints.close()


async def test_hostile_orgs_do_not_delay_the_others(clock: ManualClock) -> None:
    """Each kind of endpoint for an org of its own, and one good org: it starts when it likes."""
    issuer, credentials = FakeIssuer(clock), FakeCredentials()
    issuer.add(App("org_a", "client-a", "secret-a"))
    credentials.add(ORG, "client-a", "secret-a")
    async with issuer.client() as client:
        issuers = {"main": kinde_issuer(), "bad": kinde_issuer(name="bad", url="https://bad.kinde.com")}
        tokens = Tokens(issuers, credentials, client=client, clock=clock)
        issuer.answer = lambda form: hang() if form["client_id"] != "client-a" else None
        for number in range(50):
            credentials.add(org(number), f"bad-{number}", "secret")
        waiting = [
            asyncio.ensure_future(tokens.ensure(TokenWant(org(number), "bad"))) for number in range(50)
        ]
        await settle()
        before = clock.monotonic()

        assert (await tokens.ensure(TokenWant(ORG, "main"))).claims.org_code == "org_a"

        assert clock.monotonic() == before
        for task in waiting:
            task.cancel()
        await tokens.close()
        with suppress(asyncio.CancelledError, WorkerError):
            await asyncio.gather(*waiting)


def _without_expires_in(answer: httpx.Response, **changes: Any) -> httpx.Response:
    members = {name: value for name, value in answer.json().items() if name != "expires_in"}
    return httpx.Response(200, json=members | changes)


def test_these_are_enough_endpoints() -> None:
    """At least twenty-five, not counting discovery."""
    assert len(TOKEN_ENDPOINTS) + len(KEY_SETS) >= 25
