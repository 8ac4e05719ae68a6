"""The development provider's login: what it refuses, as a real provider does."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import pytest

from tests.fakes.clock import ManualClock
from worker.demo.people import CODE_LASTS, Person, WebApplication
from worker.demo.provider import Provider

URL = "http://127.0.0.1:9000"
BACK = "http://127.0.0.1:8470/login/callback"
VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
ASKED = {
    "client_id": "console",
    "redirect_uri": BACK,
    "response_type": "code",
    "scope": "openid",
    "state": "s",
    "nonce": "n",
    "code_challenge": CHALLENGE,
    "code_challenge_method": "S256",
}


@pytest.fixture
async def provider(clock: ManualClock) -> AsyncIterator[httpx.AsyncClient]:
    made = Provider(URL, clock=clock)
    made.people.add(Person("kp_1", "<b>Ann</b>", "ann@a.example", "org_a", ("jobs:read",)))
    made.people.add_application(
        WebApplication("console", "s3cret", (BACK,), ("http://127.0.0.1:8470/login",))
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made.asgi()), base_url=URL) as client:
        yield client


async def code_of(provider: httpx.AsyncClient) -> str:
    answer = await provider.post("/oauth2/auth", data=ASKED | {"person": "kp_1"})
    return parse_qs(urlsplit(answer.headers["location"]).query)["code"][0]


async def redeem(provider: httpx.AsyncClient, code: str, **changes: str) -> httpx.Response:
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": BACK,
        "client_id": "console",
        "client_secret": "s3cret",
        "code_verifier": VERIFIER,
    }
    return await provider.post("/oauth2/token", data=form | changes)


async def test_a_code_becomes_tokens_once(provider: httpx.AsyncClient):
    code = await code_of(provider)
    tokens = (await redeem(provider, code)).json()
    again = await redeem(provider, code)

    claims: dict[str, Any] = jwt.decode(tokens["id_token"], options={"verify_signature": False})
    assert claims["aud"] == ["console"]
    assert (claims["sub"], claims["nonce"], claims["org_code"]) == ("kp_1", "n", "org_a")
    assert claims["permissions"] == ["jobs:read"]
    assert (again.status_code, again.json()["error"]) == (400, "invalid_grant")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_verifier": "w" * 43}, "invalid_grant"),
        ({"redirect_uri": "http://127.0.0.1:8470/"}, "invalid_grant"),
        ({"client_secret": "guess"}, "invalid_client"),
        ({"client_id": "other"}, "invalid_client"),
    ],
)
async def test_a_code_is_of_its_client_address_and_verifier(
    provider: httpx.AsyncClient, changes: dict[str, str], error: str
):
    assert (await redeem(provider, await code_of(provider), **changes)).json()["error"] == error


async def test_a_code_expires(provider: httpx.AsyncClient, clock: ManualClock):
    code = await code_of(provider)
    clock.advance(CODE_LASTS + 1)

    assert (await redeem(provider, code)).status_code == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": "other"},
        {"redirect_uri": "http://evil.example/login/callback"},
        {"redirect_uri": BACK + "/"},
        {"response_type": "token"},
        {"scope": "email"},
        {"code_challenge_method": "plain"},
        {"code_challenge": ""},
    ],
)
async def test_it_sends_nobody_anywhere_for_an_invalid_request(
    provider: httpx.AsyncClient, changes: dict[str, str]
):
    page = await provider.get("/oauth2/auth", params=ASKED | changes)
    chosen = await provider.post("/oauth2/auth", data=ASKED | changes | {"person": "kp_1"})

    assert (page.status_code, chosen.status_code) == (400, 400)
    assert "location" not in chosen.headers


async def test_the_page_escapes_what_it_shows_and_logout_leads_only_to_registered_addresses(
    provider: httpx.AsyncClient,
):
    page = await provider.get("/oauth2/auth", params=ASKED | {"state": '"><script>'})
    assert page.status_code == 200
    assert "<script" not in page.text
    assert "<b>" not in page.text
    known = await provider.get("/logout", params={"redirect": "http://127.0.0.1:8470/login"})
    other = await provider.get("/logout", params={"redirect": "http://evil.example/"})

    assert (known.status_code, known.headers["location"]) == (303, "http://127.0.0.1:8470/login")
    assert (other.status_code, "location" in other.headers) == (200, False)
