"""Decoding: Kinde's shape as a golden test, and the layout of each other provider."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import TokenRefused
from worker.guard.claims import Flag
from worker.guard.decode import decode
from worker.guard.profile import load

GOLDEN = {
    "org_code": "org_123456789",
    "application_properties": {"model_version": {"v": "gpt-4"}, "region": {"v": "eu"}},
    "feature_flags": {"agent-v2": {"t": "b", "v": True}, "beta-tools": {"t": "b", "v": False}},
}


def test_the_sample_token_of_kinde_is_decoded_exactly() -> None:
    """The golden test: org, properties by their `v`, flags by their `t` and `v`."""
    claims = decode(GOLDEN, load("kinde"))

    assert claims.org_code == "org_123456789"
    assert claims.properties == {"model_version": "gpt-4", "region": "eu"}
    assert claims.flags == {"agent-v2": Flag("boolean", True), "beta-tools": Flag("boolean", False)}


def test_what_a_token_does_not_say_is_empty() -> None:
    """Absent claims are no error here; whoever needs them refuses."""
    claims = decode({}, load("kinde"))

    assert (claims.org_code, claims.client_id, claims.issuer, claims.jti) == ("", "", "", None)
    assert (claims.scopes, claims.properties, claims.flags) == (frozenset(), {}, {})
    assert claims.expires_at == datetime(1970, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("entry", "flag"),
    [
        ({"t": "b", "v": True}, Flag("boolean", True)),
        ({"t": "boolean", "v": False}, Flag("boolean", False)),
        ({"t": "s", "v": "beta"}, Flag("string", "beta")),
        ({"t": "string", "v": ""}, Flag("string", "")),
        ({"t": "i", "v": 1}, Flag("number", 1)),
        ({"t": "number", "v": 0.5}, Flag("number", 0.5)),
        ({"t": "j", "v": {"a": [1]}}, Flag("j", {"a": [1]})),
    ],
)
def test_a_flag_has_the_type_that_its_code_names(entry: dict, flag: Flag) -> None:
    """Boolean, string, number; what is unknown stays as it is."""
    assert decode({"feature_flags": {"x": entry}}, load("kinde")).flags == {"x": flag}


def test_a_property_that_was_never_set_is_absent() -> None:
    """Null is no value."""
    payload = {"application_properties": {"a": {"v": None}, "b": {"v": True}}}

    assert decode(payload, load("kinde")).properties == {"b": True}


def token(**claims: Any) -> dict[str, Any]:
    return {"iss": "https://idp", "iat": 100, "exp": 200, "jti": "j", "scope": "a b", **claims}


# What an org has of its own, in the layout that most share.
OWN = {"application_properties": {"tier": "pro"}, "feature_flags": {"f": True}}
OF_KINDE = {
    "application_properties": {"tier": {"v": "pro"}},
    "feature_flags": {"f": {"t": "b", "v": True}},
}
OF_AUTH0 = {"https://orgworker/properties": {"tier": "pro"}, "https://orgworker/flags": {"f": True}}
MACHINE = {"sub": "client@clients", "gty": "client-credentials"}
ORG_ID = {"acme": {"id": "42c3e46f"}}
GOLDEN_TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("kinde", token(aud=["api"], azp="client", scp=["a", "b"], org_code="acme", **OF_KINDE)),
    ("auth0", token(aud="api", azp="client", org_id="acme", **MACHINE, **OF_AUTH0)),
    ("logto", token(aud="api", client_id="client", sub="client", organization_id="acme", **OWN)),
    ("logto", token(aud="urn:logto:organization:acme", client_id="client", **OWN)),
    ("keycloak", token(aud="api", azp="client", typ="Bearer", organization=["acme"], **OWN)),
    ("keycloak", token(aud="api", azp="client", organization=ORG_ID, **OWN)),
    ("rfc9068", token(aud="api", client_id="client", sub="client", org_id="acme", **OWN)),
]


@pytest.mark.parametrize(("name", "payload"), GOLDEN_TOKENS)
def test_each_provider_says_the_same_in_its_own_layout(name: str, payload: dict) -> None:
    """One golden token a layout."""
    claims = decode(payload, load(name))

    assert (claims.org_code, claims.client_id) == ("acme", "client")
    assert claims.scopes == {"a", "b"}
    assert claims.properties == {"tier": "pro"}
    assert claims.flags == {"f": Flag("boolean", True)}
    assert claims.expires_at == datetime(1970, 1, 1, 0, 3, 20, tzinfo=UTC)


OKTA = {
    "ver": 1,
    "jti": "AT.0mP4JKAZX1iACIT4vbEDF7LpvDVjxypPMf0D7uX39RE",
    "iss": "https://acme.okta.com/oauth2/default",
    "aud": "https://api.acme.com",
    "sub": "0oabskvc6442nkvQO0h7",
    "iat": 1_700_000_000,
    "exp": 1_700_003_600,
    "cid": "0oabskvc6442nkvQO0h7",
    "scp": ["read:kb"],
    "org_id": "acme",
}
ENTRA = {
    "aud": "11112222-bbbb-3333-cccc-4444dddd5555",
    "iss": "https://login.microsoftonline.com/aaaabbbb-0000-cccc-1111-dddd2222eeee/v2.0",
    "iat": 1_700_000_000,
    "nbf": 1_700_000_000,
    "exp": 1_700_003_900,
    "aio": "k2RgYPjzyLvY4Q==",
    "azp": "00001111-aaaa-2222-bbbb-3333cccc4444",
    "azpacr": "1",
    "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
    "rh": "0.AXYAqOdw6jRZ",
    "roles": ["read:kb", "org:acme"],
    "sub": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
    "tid": "aaaabbbb-0000-cccc-1111-dddd2222eeee",
    "uti": "ei9kLnvfnUW37Vn",
    "ver": "2.0",
}
ROLES = "urn:zitadel:iam:org:project:229185001:roles"
ZITADEL = {
    "iss": "https://acme.zitadel.cloud",
    "sub": "229186002",
    "aud": ["229185001"],
    "iat": 1_700_000_000,
    "nbf": 1_700_000_000,
    "exp": 1_700_043_200,
    "client_id": "jobs-of-acme",
    "jti": "V2_229187003-at_229187004",
    ROLES: {"read:kb": {"acme": "acme.example.com"}},
    "urn:zitadel:iam:user:resourceowner:id": "acme",
    "urn:zitadel:iam:user:resourceowner:name": "Acme",
    "urn:zitadel:iam:user:resourceowner:primary_domain": "acme.example.com",
}


@pytest.mark.parametrize(
    ("name", "payload", "client"),
    [
        ("okta", OKTA, "0oabskvc6442nkvQO0h7"),
        ("entra", ENTRA, "00001111-aaaa-2222-bbbb-3333cccc4444"),
        ("zitadel", ZITADEL, "jobs-of-acme"),
    ],
)
def test_the_documented_tokens_of_okta_entra_and_zitadel_are_decoded(
    name: str, payload: dict, client: str
) -> None:
    """As their documentation shows them; none has properties or flags of its own."""
    claims = decode(payload, load(name))

    assert (claims.org_code, claims.client_id, claims.scopes) == ("acme", client, {"read:kb"})
    assert (claims.properties, claims.flags) == ({}, {})
    assert claims.issuer == payload["iss"]


@pytest.mark.parametrize("name", ["okta", "zitadel"])
def test_okta_and_zitadel_take_properties_and_flags_from_a_hook(name: str) -> None:
    """A token inline hook, or an action."""
    payload = (OKTA if name == "okta" else ZITADEL) | OWN
    claims = decode(payload, load(name))

    assert (claims.properties, claims.flags) == ({"tier": "pro"}, {"f": Flag("boolean", True)})


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        # An app without org_id in its profile.
        ("okta", OKTA | {"org_id": None}),
        # No app role that names an org; the tenant is that of the URL, which the caller chooses.
        ("entra", ENTRA | {"roles": ["read:kb"]}),
        ("entra", {key: value for key, value in ENTRA.items() if key != "roles"} | {"aud": "org:acme"}),
        # These two repeat what the caller asked for.
        (
            "zitadel",
            {key: value for key, value in ZITADEL.items() if "resourceowner" not in key}
            | {"urn:zitadel:iam:org:id": "acme", "urn:zitadel:iam:org:domain:primary": "acme.example.com"},
        ),
    ],
)
def test_what_the_caller_chose_names_no_org(name: str, payload: dict) -> None:
    assert decode(payload, load(name)).org_code == ""


def of_keycloak(organization: Any) -> tuple[str, dict[str, Any]]:
    return "keycloak", {"organization": organization}


# A client that has several orgs could choose; Keycloak has a list or a map of them.
REFUSED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "org_ambiguous": [
        ("entra", ENTRA | {"roles": ["org:acme", "org:globex", "read:kb"]}),
        *map(of_keycloak, (["acme", "other"], {"acme": {}, "other": {}})),
    ],
    "org_type": [*map(of_keycloak, ("acme", 1, [1], [["acme"]]))],
    "scope_type": [
        ("zitadel", ZITADEL | {ROLES: roles})
        for roles in (["read:kb"], {"read:kb": "acme"}, {"read:kb": ["acme"]}, "read:kb")
    ],
}


@pytest.mark.parametrize(
    ("detail", "name", "payload"),
    [(detail, *token) for detail, tokens in REFUSED.items() for token in tokens],
)
def test_several_orgs_and_claims_in_another_shape_are_refused(detail: str, name: str, payload: dict) -> None:
    with pytest.raises(TokenRefused) as refused:
        decode(payload, load(name))

    assert refused.value.detail == detail


def test_a_role_that_another_org_granted_is_no_scope() -> None:
    """Else an org could be given rights by another one, in its own data."""
    roles = {"read:kb": {"globex": "globex.example.com"}, "write:kb": {"globex": "g", "acme": "a"}}

    assert decode(ZITADEL | {ROLES: roles}, load("zitadel")).scopes == {"write:kb"}


def test_the_roles_of_another_project_are_no_scopes() -> None:
    other = {"urn:zitadel:iam:org:project:999:roles": {"write:kb": {"acme": "acme.example.com"}}}

    assert decode(ZITADEL | other, load("zitadel")).scopes == {"read:kb"}
    assert decode(ZITADEL | {"aud": ["229185001", "999"]}, load("zitadel")).scopes == frozenset()


def test_workos_lists_the_flags_that_are_on() -> None:
    """It has no properties."""
    payload = token(aud="client_env", client_id="client", sub="client", org_id="acme")
    claims = decode(payload | {"feature_flags": ["f"]}, load("workos"))

    assert (claims.org_code, claims.client_id, claims.scopes) == ("acme", "client", {"a", "b"})
    assert claims.flags == {"f": Flag("boolean", True)}


def test_an_audience_that_is_an_org_counts_for_logto_alone() -> None:
    """And only with its prefix, alone."""
    prefix = "urn:logto:organization:"

    assert decode({"aud": f"{prefix}acme"}, load("kinde")).org_code == ""
    assert decode({"aud": [f"{prefix}acme", f"{prefix}other"]}, load("logto")).org_code == ""
    assert decode({"aud": "acme"}, load("logto")).org_code == ""
