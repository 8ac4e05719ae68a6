"""The development provider: Kinde's requests, errors and token layout, and its faults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest

from tests.fakes.clock import ManualClock
from worker.demo.provider import Application, Fault, Provider

URL = "http://127.0.0.1:9000"
AUDIENCE = "https://api.example"


@pytest.fixture
def provider(clock: ManualClock) -> Provider:
    app = Application(
        org_code="org_acme",
        client_id="acme",
        client_secret="right",
        scopes=("read:kb", "write:kb"),
        audiences=(AUDIENCE,),
        properties={"model_version": "gpt-4", "max_tokens": 1000, "beta": True},
        flags={"agent-v2": True, "region": "eu", "limit": 3},
    )
    return Provider(URL, [app], clock=clock)


@pytest.fixture
async def http(provider: Provider) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(provider.asgi())
    async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
        yield client


async def ask(http: httpx.AsyncClient, **fields: str) -> httpx.Response:
    form = {
        "grant_type": "client_credentials",
        "client_id": "acme",
        "client_secret": "right",
        "audience": AUDIENCE,
    }
    return await http.post("/oauth2/token", data=form | fields)


async def claims_of(http: httpx.AsyncClient, **fields: str) -> dict[str, Any]:
    answer = await ask(http, **fields)
    assert answer.status_code == 200, answer.text
    token = answer.json()["access_token"]
    decoded: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return decoded


async def published_key(http: httpx.AsyncClient, token: str) -> jwt.PyJWK:
    keys = jwt.PyJWKSet.from_dict((await http.get("/.well-known/jwks")).json())
    return keys[jwt.get_unverified_header(token)["kid"]]


async def test_a_token_has_kindes_layout(http, clock):
    claims = await claims_of(http)

    issued_at = int(clock.now().timestamp())
    assert claims.pop("jti")
    assert claims == {
        "iss": URL,
        "aud": [AUDIENCE],
        "azp": "acme",
        "gty": ["client_credentials"],
        "iat": issued_at,
        "exp": issued_at + 86400,
        "scope": "read:kb write:kb",
        "scp": ["read:kb", "write:kb"],
        "v": "2",
        "org_code": "org_acme",
        "application_properties": {
            "model_version": {"v": "gpt-4"},
            "max_tokens": {"v": "1000"},
            "beta": {"v": True},
        },
        "feature_flags": {
            "agent-v2": {"t": "b", "v": True},
            "region": {"t": "s", "v": "eu"},
            "limit": {"t": "i", "v": 3},
        },
    }


async def test_a_narrower_scope_is_granted_as_asked(http):
    claims = await claims_of(http, scope="read:kb")

    assert (claims["scope"], claims["scp"]) == ("read:kb", ["read:kb"])


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"client_secret": "wrong"}, 401, "invalid_client"),
        ({"client_id": "nobody"}, 401, "invalid_client"),
        ({"audience": ""}, 400, "invalid_request"),
        ({"audience": "https://other.example"}, 400, "unauthorized_client"),
        ({"scope": "read:kb drop:kb"}, 400, "invalid_scope"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
    ],
)
async def test_a_bad_request_is_answered_with_its_error(http, fields, status, code):
    answer = await ask(http, **fields)

    assert (answer.status_code, answer.json()["error"]) == (status, code)


async def test_the_signature_holds_by_the_published_key(http):
    token = (await ask(http)).json()["access_token"]

    key = await published_key(http, token)

    assert jwt.get_unverified_header(token)["typ"] == "JWT"
    # The clock of the test is not the machine's, so only signature and audience are checked here.
    jwt.decode(token, key, algorithms=["RS256"], audience=AUDIENCE, options={"verify_iat": False})


async def test_a_forged_token_has_a_known_kid_and_a_bad_signature(http, provider):
    provider.misbehave(Fault(forged=True))
    token = (await ask(http)).json()["access_token"]

    key = await published_key(http, token)

    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token, key, algorithms=["RS256"], audience=AUDIENCE)


async def test_claims_are_replaced_and_left_out_as_told(http, provider):
    provider.misbehave(Fault(replace={"iss": "https://evil.example"}, drop=("org_code",)), "acme")

    claims = await claims_of(http)

    assert claims["iss"] == "https://evil.example"
    assert "org_code" not in claims


async def test_an_aged_token_has_expired(http, provider, clock):
    provider.misbehave(Fault(age=7200, lifetime=3600))

    claims = await claims_of(http)

    assert claims["exp"] == int(clock.now().timestamp()) - 3600


async def test_a_fault_wears_off_after_its_times(http, provider):
    provider.misbehave(Fault(status=503, headers={"Retry-After": "1"}, times=2))

    answers = [await ask(http) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[0].headers["retry-after"] == "1"


async def test_a_fault_of_one_client_leaves_the_others_alone(http, provider):
    provider.misbehave(Fault(status=503), "somebody-else")

    assert (await ask(http)).status_code == 200


async def test_keys_rotate_and_may_be_published_late(http, provider):
    first = provider.keys.as_jwks()["keys"][0]["kid"]
    second = provider.keys.rotate(publish=False)

    before = (await http.get("/.well-known/jwks")).json()["keys"]
    provider.keys.publish()
    after = (await http.get("/.well-known/jwks")).json()["keys"]

    assert [key["kid"] for key in before] == [first]
    assert [key["kid"] for key in after] == [first, second]
    token = (await ask(http)).json()["access_token"]
    assert jwt.get_unverified_header(token)["kid"] == second


async def test_requests_are_counted_for_each_client(http, provider):
    await ask(http)
    await ask(http, client_secret="wrong")
    await http.get("/.well-known/jwks")

    assert (provider.requests, provider.token_requests) == ({"token": 2, "jwks": 1}, {"acme": 2})


async def test_another_process_can_set_faults_and_applications(http, provider):
    app = {"org_code": "org_b", "client_secret": "s", "audiences": [AUDIENCE]}
    assert (await http.put("/control/apps/b", json=app)).status_code == 204
    assert (await http.put("/control/faults/b", json={"replace": {"org_code": "x"}})).status_code == 204

    claims = await claims_of(http, client_id="b", client_secret="s")

    assert claims["org_code"] == "x"
    assert (await http.delete("/control/faults/b")).status_code == 204
    assert (await claims_of(http, client_id="b", client_secret="s"))["org_code"] == "org_b"


async def test_the_key_set_can_be_taken_down(http):
    await http.put("/control/faults/jwks", json={"status": 503})

    assert (await http.get("/.well-known/jwks")).status_code == 503


async def test_an_unknown_fault_is_named(http):
    answer = await http.put("/control/faults/*", json={"stats": 503})

    assert answer.status_code == 400
    assert "stats" in answer.json()["error"]


@pytest.mark.parametrize(("client", "host"), [("192.0.2.7", "127.0.0.1"), ("127.0.0.1", "rebound.example")])
async def test_the_control_endpoint_is_for_loopback_only(provider, client, host):
    transport = httpx.ASGITransport(provider.asgi(), client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
        answer = await http.get("/control/")

    assert answer.status_code == 403


def test_an_application_shows_no_secret_in_its_repr():
    app = Application("org_acme", "acme", "s3cret-canary")

    assert "s3cret-canary" not in repr(app)
