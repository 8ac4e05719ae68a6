"""The guard: what a customer's own backend answers to a token, as RFC 6750 has it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.responses import JSONResponse

from tests.fakes import forms
from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import AUDIENCE, URL, App, FakeIssuer, jwk, make_token
from worker.errors import ConfigurationError, TokenRefused
from worker.guard import Guard, RequireToken, check

APP = App("org_a", "client-a", "secret-a", scopes=("read:kb",))


@pytest.fixture
def issuer(clock: ManualClock) -> FakeIssuer:
    return FakeIssuer(clock)


@pytest.fixture
async def guard(issuer: FakeIssuer, clock: ManualClock) -> AsyncIterator[Guard]:
    async with issuer.client() as client:
        yield Guard(URL, audience=AUDIENCE, scopes={"read:kb"}, client=client, clock=clock)


@pytest.fixture
async def api(guard: Guard) -> AsyncIterator[httpx.AsyncClient]:
    """A backend behind the middleware."""
    guarded = RequireToken(JSONResponse({}), guard, open_paths={"/health"})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://api") as client:
        yield client


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
async def test_the_scheme_is_compared_without_case(
    api: httpx.AsyncClient, issuer: FakeIssuer, scheme: str
) -> None:
    """RFC 9110, section 11.1."""
    headers = {"Authorization": f"{scheme} {issuer.token(APP)}"}

    assert (await api.get("/orgs/org_a/articles", headers=headers)).status_code == 200


async def test_a_token_in_the_query_does_not_count(api: httpx.AsyncClient, issuer: FakeIssuer) -> None:
    """URLs are logged."""
    answer = await api.get(f"/orgs/org_a/articles?access_token={issuer.token(APP)}")

    assert answer.status_code == 401


async def test_an_open_path_needs_no_token(api: httpx.AsyncClient, issuer: FakeIssuer) -> None:
    """And causes no request for keys."""
    assert (await api.get("/health")).status_code == 200
    assert issuer.requests == []


async def test_made_up_kids_cost_one_fetch_a_cooldown(api: httpx.AsyncClient, issuer: FakeIssuer) -> None:
    """A flood of them is answered 401 at once and cannot be turned against the issuer."""
    await api.get("/orgs/org_a/articles", headers=bearer(issuer.token(APP)))
    for number in range(50):
        forged = make_token(issuer.payload(APP), {"kid": f"made-up-{number}"}, key="evil")
        answer = await api.get("/orgs/org_a/articles", headers=bearer(forged))
        assert answer.status_code == 401

    assert issuer.count("/.well-known/jwks") == 2


async def test_a_rotated_key_is_found_at_once_and_in_a_flood_within_ten_seconds(
    guard: Guard, issuer: FakeIssuer, clock: ManualClock
) -> None:
    """Right after a fetch, too."""
    await guard.check(issuer.token(APP))
    issuer.key, issuer.published = "k2", ["k1", "k2"]
    await guard.check(issuer.token(APP))

    issuer.key, issuer.published = "k3", ["k2", "k3"]
    with pytest.raises(TokenRefused):
        await guard.check(issuer.token(APP))
    clock.advance(10)
    await guard.check(issuer.token(APP))


async def test_an_unknown_kid_is_no_verdict_while_the_keys_cannot_be_read(
    api: httpx.AsyncClient, issuer: FakeIssuer, clock: ManualClock
) -> None:
    """The cached set may be older than the key."""
    path = "/orgs/org_a/articles"
    assert (await api.get(path, headers=bearer(issuer.token(APP)))).status_code == 200
    known = bearer(issuer.token(APP))
    issuer.key, issuer.published = "k2", ["k1", "k2"]
    issuer.keys = lambda: httpx.Response(503)
    rotated = bearer(issuer.token(APP))

    for _ in range(2):
        answer = await api.get(path, headers=rotated)
        assert answer.status_code == 503 and "Retry-After" in answer.headers
    assert (await api.get(path, headers=known)).status_code == 200
    issuer.keys = None
    clock.advance(10)

    assert (await api.get(path, headers=rotated)).status_code == 200


async def test_a_withdrawn_key_is_forgotten_within_the_hour(
    guard: Guard, issuer: FakeIssuer, clock: ManualClock
) -> None:
    """The set is read anew beside its use."""
    await guard.check(issuer.token(APP))
    issuer.keys = lambda: httpx.Response(200, json={"keys": [jwk("k2")]})
    clock.advance(3601)
    await guard.check(issuer.token(APP))
    await settle(50)

    with pytest.raises(TokenRefused) as refused:
        await guard.check(issuer.token(APP))
    assert refused.value.detail == "unknown_kid"


async def test_the_function_and_the_guard_say_the_same(guard: Guard, issuer: FakeIssuer) -> None:
    """`worker.guard.check` is for who does not want a class."""
    claims = await check(issuer.token(APP), guard)

    assert claims == await guard.check(issuer.token(APP, jti=claims.jti), org_code="org_a")


async def test_a_guard_without_an_audience_is_refused() -> None:
    """Any API's token would do."""
    with pytest.raises(ConfigurationError, match="audience"):
        Guard(URL)


async def test_a_guard_of_an_issuer_without_tls_is_refused() -> None:
    """Whoever sits between could publish keys of his own."""
    with pytest.raises(ConfigurationError, match="https"):
        Guard("http://acme.kinde.com", audience=AUDIENCE)


async def test_a_websocket_without_a_token_is_closed_before_it_is_accepted(guard: Guard) -> None:
    """ASGI servers answer that with 403."""

    async def app(*ignored: object) -> None:
        raise AssertionError("reached")

    sent = await forms.open_websocket(RequireToken(app, guard))

    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_the_lifespan_passes_through(guard: Guard) -> None:
    """The application's own start-up is not guarded."""
    seen: list[str] = []

    async def app(scope: dict, receive: object, send: object) -> None:
        seen.append(scope["type"])

    await RequireToken(app, guard)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]

    assert seen == ["lifespan"]
