"""Signed tokens as Okta, Entra ID and Zitadel document them: whose org they name, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import jwk, make_token
from worker.errors import TokenRefused
from worker.guard import Guard
from worker.guard.claims import Claims
from worker.outbound import open_client

TENANT = "aaaabbbb-0000-cccc-1111-dddd2222eeee"
OTHER_TENANT = "99990000-0000-cccc-1111-dddd2222eeee"
ENTRA = f"https://login.microsoftonline.com/{TENANT}/v2.0"
ROLES = "urn:zitadel:iam:org:project:229185001:roles"
# The url, the audience, and the payload without its times.
TOKENS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "okta": (
        "https://acme.okta.com/oauth2/default",
        "https://api.acme.com",
        {"ver": 1, "sub": "0oabs", "cid": "0oabs", "scp": ["read:kb"], "org_id": "acme"},
    ),
    "entra": (
        ENTRA,
        "11112222-bbbb-3333-cccc-4444dddd5555",
        {
            "azp": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "azpacr": "1",
            "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
            "roles": ["read:kb", "org:acme"],
            "tid": TENANT,
            "ver": "2.0",
        },
    ),
    "zitadel": (
        "https://acme.zitadel.cloud",
        "229185001",
        {
            "sub": "229186002",
            "client_id": "jobs-of-acme",
            ROLES: {"read:kb": {"acme": "acme.example.com"}},
            "urn:zitadel:iam:user:resourceowner:id": "acme",
        },
    ),
}
# Discovery documents and key sets. The keys of Entra have no alg, and serve all tenants.
WEB: dict[str, Any] = {
    "https://acme.okta.com/oauth2/default/v1/keys": {"keys": [jwk("k1")]},
    f"{ENTRA}/.well-known/openid-configuration": {
        "issuer": ENTRA,
        "token_endpoint": f"https://login.microsoftonline.com/{TENANT}/oauth2/v2.0/token",
        "jwks_uri": f"https://login.microsoftonline.com/{TENANT}/discovery/v2.0/keys",
    },
    f"https://login.microsoftonline.com/{TENANT}/discovery/v2.0/keys": {
        "keys": [jwk("k1", alg=None, x5t="k1")]
    },
    "https://acme.zitadel.cloud/oauth/v2/keys": {"keys": [jwk("k1")]},
}


def respond(request: httpx.Request) -> httpx.Response:
    found = WEB.get(str(request.url))
    return httpx.Response(404) if found is None else httpx.Response(200, json=found)


async def check(name: str, clock: ManualClock, changes: Mapping[str, Any] | None = None) -> Claims:
    """The claims of the golden token with some claims changed, for the org acme with read:kb."""
    url, audience, payload = TOKENS[name]
    now = int(clock.now().timestamp())
    times = {"iat": now - 300, "nbf": now - 300, "exp": now + 3600}
    header = {} if name == "zitadel" else {"typ": None if name == "okta" else "JWT", "x5t": "k1"}
    token = make_token({"iss": url, "aud": audience} | times | payload | dict(changes or {}), header)
    async with open_client(httpx.MockTransport(respond)) as client:
        guard = Guard(url, audience=audience, profile=name, scopes={"read:kb"}, client=client, clock=clock)
        claims = await guard.check(token, org_code="acme")
        await guard.close()
    return claims


@pytest.mark.parametrize("name", TOKENS)
async def test_the_documented_token_is_accepted_for_its_org(name: str, clock: ManualClock) -> None:
    claims = await check(name, clock)

    assert (claims.org_code, claims.scopes) == ("acme", {"read:kb"})
    assert claims.client_id in TOKENS[name][2].values()


@pytest.mark.parametrize(
    ("name", "changes", "reason", "detail"),
    [
        ("okta", {"org_id": "globex"}, "org_mismatch", "other_org"),
        # The expression of the claim is null for an app without org_id in its profile.
        ("okta", {"org_id": None}, "org_mismatch", "org_missing"),
        ("okta", {"iss": "https://acme.okta.com"}, "token_invalid", "issuer"),
        ("okta", {"scp": []}, "scope_missing", "read:kb"),
        # Its keys sign for every tenant, so the issuer alone keeps other tenants out.
        (
            "entra",
            {"iss": f"https://login.microsoftonline.com/{OTHER_TENANT}/v2.0", "tid": OTHER_TENANT},
            "token_invalid",
            "issuer",
        ),
        ("entra", {"iss": f"https://sts.windows.net/{TENANT}/", "ver": "1.0"}, "token_invalid", "issuer"),
        ("entra", {"roles": ["read:kb", "org:globex"]}, "org_mismatch", "other_org"),
        ("entra", {"roles": ["read:kb", "org:acme", "org:globex"]}, "token_invalid", "org_ambiguous"),
        ("entra", {"roles": ["read:kb"]}, "org_mismatch", "org_missing"),
        ("entra", {"roles": ["org:acme"]}, "scope_missing", "read:kb"),
        ("zitadel", {"urn:zitadel:iam:user:resourceowner:id": "globex"}, "org_mismatch", "other_org"),
        (
            "zitadel",
            {"urn:zitadel:iam:user:resourceowner:id": None, "urn:zitadel:iam:org:id": "acme"},
            "org_mismatch",
            "org_missing",
        ),
        ("zitadel", {ROLES: {"read:kb": {"globex": "globex.example.com"}}}, "scope_missing", "read:kb"),
        ("zitadel", {"aud": ["229185001", "999"]}, "token_invalid", "audience_wider"),
    ],
)
async def test_a_token_that_names_the_org_in_no_binding_claim_is_refused(
    name: str, changes: dict[str, Any], reason: str, detail: str, clock: ManualClock
) -> None:
    with pytest.raises(TokenRefused) as refused:
        await check(name, clock, changes)

    assert (refused.value.reason, refused.value.detail) == (reason, detail)
