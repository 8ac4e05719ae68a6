"""The grant: how each kind of client proves itself, and what each answer means."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import AUDIENCE, URL, kinde_issuer, profile, rsa_key
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected, Throttled
from worker.guard.issuer import Issuer
from worker.guard.profile import load
from worker.ids import OrgId
from worker.outbound import open_client
from worker.secret import Secret
from worker.tokens.credentials import Credential
from worker.tokens.issuer_client import GrantedToken, IssuerClient

ENDPOINT = f"{URL}/oauth2/token"
GOOD = httpx.Response(200, json={"access_token": "a.b.c", "token_type": "Bearer", "expires_in": 60})


def credential(secret: str = "s", **changes: Any) -> Credential:
    values: dict[str, Any] = {
        "id": "c1",
        "org_id": OrgId("o1"),
        "org_code": "org_a",
        "generation": 1,
        "client_id": "client",
        "secret": Secret(secret),
    }
    return Credential(**(values | changes))


async def ask(
    clock: ManualClock,
    issuer: Issuer,
    used: Credential,
    answer: httpx.Response = GOOD,
    *,
    audience: str = AUDIENCE,
) -> tuple[GrantedToken, httpx.Request, dict[str, list[str]]]:
    """What came, and the request that was made for it."""
    seen: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer

    async with open_client(httpx.MockTransport(respond)) as client:
        issuer_client = IssuerClient(replace(issuer, token_endpoint=ENDPOINT), client, clock=clock)
        granted = await issuer_client.grant(used, audience=audience, scopes=frozenset({"b", "a"}), tries=1)
    return granted, seen[0], parse_qs(seen[0].content.decode())


async def test_kinde_gets_the_secret_in_the_body(clock: ManualClock) -> None:
    """client_secret_post, scopes in a steady order, no org parameter."""
    granted, request, form = await ask(clock, kinde_issuer(), credential("a&b=c ü"))

    assert (granted.text, granted.expires_in) == ("a.b.c", 60.0)
    assert form == {
        "grant_type": ["client_credentials"],
        "client_id": ["client"],
        "client_secret": ["a&b=c ü"],
        "audience": [AUDIENCE],
        "scope": ["a b"],
    }
    assert "authorization" not in request.headers
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"


async def test_basic_is_form_encoded_first(clock: ManualClock) -> None:
    """RFC 6749, section 2.3.1: a colon or a percent sign in a secret stays one."""
    issuer = kinde_issuer(profile=profile(client_authentication="basic"))
    _, request, form = await ask(clock, issuer, credential("p:w%/+ ü", client_id="cl:ient"))

    scheme, _, encoded = request.headers["authorization"].partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(encoded) == b"cl%3Aient:p%3Aw%25%2F%2B+%C3%BC"
    assert "client_secret" not in form


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auth0", {"audience": [AUDIENCE], "organization": ["org_a"]}),
        ("logto", {"resource": [AUDIENCE], "organization_id": ["org_a"]}),
        ("workos", {}),
        ("keycloak", {}),
        ("rfc9068", {"resource": [AUDIENCE]}),
    ],
)
async def test_each_provider_is_asked_in_its_own_words(name: str, expected: dict, clock: ManualClock) -> None:
    """The parameters that scope a token to an org and an audience."""
    _, _, form = await ask(clock, kinde_issuer(profile=load(name)), credential())

    own = {"grant_type", "client_id", "client_secret", "scope"}
    assert {key: value for key, value in form.items() if key not in own} == expected


ZITADEL_SCOPE = (
    "openid urn:zitadel:iam:org:project:id:229:aud urn:zitadel:iam:org:projects:roles "
    "urn:zitadel:iam:user:resourceowner"
)


@pytest.mark.parametrize(
    ("name", "audience", "scope"),
    [
        ("okta", "https://api.acme.com", "a b"),
        ("entra", "7f1c", "7f1c/.default"),
        ("zitadel", "229", ZITADEL_SCOPE),
    ],
)
async def test_a_provider_gets_the_audience_in_the_scope_where_it_takes_it_there(
    name: str, audience: str, scope: str, clock: ManualClock
) -> None:
    """Entra and Zitadel have no audience parameter and grant all scopes; none of the three is told an org."""
    _, _, form = await ask(clock, kinde_issuer(profile=load(name)), credential(), audience=audience)

    own = {"client_id", "client_secret"}
    sent = {key: value for key, value in form.items() if key not in own}
    assert sent == {"grant_type": ["client_credentials"], "scope": [scope]}


async def test_a_wrong_secret_at_zitadel_parks_the_org(clock: ManualClock) -> None:
    """It answers with 400 invalid_request."""
    answer = httpx.Response(400, json={"error": "invalid_request"})

    with pytest.raises(CredentialsRejected):
        await ask(clock, kinde_issuer(profile=load("zitadel")), credential(), answer, audience="229")


async def test_logto_is_asked_for_no_resource_where_the_org_is_the_audience(clock: ManualClock) -> None:
    """An organization token has the org in `aud`."""
    issuer = kinde_issuer(profile=load("logto"))
    _, _, form = await ask(clock, issuer, credential(), audience="urn:logto:organization:org_a")

    assert "resource" not in form
    assert form["organization_id"] == ["org_a"]


KEYS = {
    "RS256": lambda: rsa_key("k1"),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": lambda: ed25519.Ed25519PrivateKey.generate(),
}


@pytest.mark.parametrize("algorithm", KEYS)
@pytest.mark.parametrize("to", ["token_endpoint", "issuer"])
async def test_a_private_key_signs_a_short_assertion(algorithm: str, to: Any, clock: ManualClock) -> None:
    """RFC 7523; the audience and the type of the assertion are the profile's."""
    key = KEYS[algorithm]()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    issuer = kinde_issuer(
        profile=profile(
            client_authentication="private_key_jwt",
            assertion_audience=to,
            assertion_type="client-authentication+jwt",
        )
    )
    used = credential(pem, kind="private_key")
    _, _, form = await ask(clock, issuer, used)

    assertion = form["client_assertion"][0]
    claims = jwt.decode(
        assertion,
        key.public_key(),
        algorithms=[algorithm],
        audience=ENDPOINT if to == "token_endpoint" else URL,
        options={"verify_iat": False, "verify_exp": False},
    )
    assert claims["iss"] == claims["sub"] == "client"
    assert claims["exp"] - claims["iat"] == 60
    header = jwt.get_unverified_header(assertion)
    assert header["typ"] == "client-authentication+jwt"
    assert "client_secret" not in form


@pytest.mark.parametrize(
    "pem", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----"]
)
async def test_a_private_key_that_is_none_is_the_orgs_own_trouble(pem: str, clock: ManualClock) -> None:
    """It parks the org, as a wrong secret does."""
    issuer = kinde_issuer(profile=profile(client_authentication="private_key_jwt"))

    with pytest.raises(CredentialsRejected):
        await ask(clock, issuer, credential(pem, kind="private_key"))


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (401, "invalid_client", CredentialsRejected),
        (400, "invalid_client", CredentialsRejected),
        (401, "access_denied", CredentialsRejected),
        (401, "unauthorized_client", CredentialsRejected),
        (401, None, CredentialsRejected),
        (400, "invalid_grant", CredentialsRejected),
        (400, "invalid_scope", RequestRejected),
        (400, "unauthorized_client", RequestRejected),
        (403, "access_denied", RequestRejected),
        (400, "invalid_target", RequestRejected),
        (400, "unsupported_grant_type", RequestRejected),
        (400, "a_new_one", RequestRejected),
        (400, "temporarily_unavailable", IssuerUnavailable),
        (400, "slow_down", Throttled),
        (429, None, Throttled),
        (429, "invalid_client", Throttled),
        (400, None, IssuerUnavailable),
        (403, None, IssuerUnavailable),
        (404, None, IssuerUnavailable),
        (408, None, IssuerUnavailable),
        (500, "invalid_client", IssuerUnavailable),
        (503, None, IssuerUnavailable),
        (302, None, IssuerUnavailable),
    ],
)
async def test_each_answer_is_of_one_class(
    status: int, error: str | None, expected: type[Exception], clock: ManualClock
) -> None:
    """By its status where that is plain, else by its error code."""
    body = {} if error is None else {"error": error, "error_description": "prose of the provider"}

    with pytest.raises(expected) as raised:
        await ask(clock, kinde_issuer(), credential(), httpx.Response(status, json=body))

    assert type(raised.value) is expected
    assert "prose" not in str(raised.value)


async def test_a_profile_can_say_what_an_error_means(clock: ManualClock) -> None:
    """The error map."""
    issuer = kinde_issuer(profile=profile(errors={"quota_exceeded": "throttle"}))

    with pytest.raises(Throttled):
        await ask(clock, issuer, credential(), httpx.Response(400, json={"error": "quota_exceeded"}))
