"""Which claims give which role, and where a login may lead."""

from __future__ import annotations

from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import kinde_issuer, profile
from worker.errors import AccessDenied, ConfigurationError, TokenRefused
from worker.features.console.callers import Caller
from worker.features.console.login import Login, basis_of, local_path
from worker.guard.issuer import Issuer
from worker.guard.profile import load
from worker.settings.sections import LoginSettings

VENDOR = "org_vendor"


def caller(claims: dict[str, Any], *rules: dict[str, str], default_role: str = "none") -> Caller:
    """Who a person with these claims is."""
    settings = LoginSettings(issuer="main", client_id="console", roles=rules, default_role=default_role)
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(404)))
    login = Login(settings, kinde_issuer(), client, lambda: "secret", clock=ManualClock())
    return login._caller({"sub": "kp_1", "email": "pat@a.example"}, {"org_code": "org_a"} | claims)


def rule(value: str, role: str, claim: str = "permissions", org: str = "") -> dict[str, str]:
    return {"claim": claim, "value": value, "role": role, "org": org}


@pytest.mark.parametrize(
    ("claim", "claims"),
    [
        ("permissions", {"permissions": ["a", "jobs"]}),
        ("role", {"role": "jobs"}),
        ("scope", {"scope": "openid jobs"}),
        # Kinde's roles are objects.
        ("roles", {"roles": [{"id": "1", "key": "jobs", "name": "Jobs"}]}),
        ("realm_access.roles", {"realm_access": {"roles": ["jobs"]}}),
        ("https://acme.com/roles", {"https://acme.com/roles": ["jobs"]}),
    ],
)
def test_a_claim_is_a_text_a_list_or_a_path(claim: str, claims: dict[str, Any]):
    assert caller(claims, rule("jobs", "member", claim)).role == "member"


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"permissions": None},
        {"permissions": "jobs:read jobs"},
        {"permissions": ["jobs:read", "JOBS", "job"]},
        {"permissions": {"jobs": True}},
        {"permissions": [["jobs"]]},
        {"permissions": True},
        {"permissions": [{"name": "jobs"}]},
    ],
)
def test_anything_else_matches_nothing(claims: dict[str, Any]):
    with pytest.raises(AccessDenied, match="no role"):
        caller(claims, rule("jobs", "manager"))


def test_the_highest_role_counts_and_those_over_all_orgs_only_in_the_operators_org():
    rules = (
        rule("support", "viewer", org=VENDOR),
        rule("admin", "admin", org=VENDOR),
        rule("read", "member"),
        rule("manage", "manager"),
    )
    everything = {"permissions": ["support", "admin", "read", "manage"]}

    theirs = caller(everything, *rules)
    ours = caller(everything | {"org_code": VENDOR}, *rules)

    assert (theirs.role, theirs.org, theirs.actor) == ("manager", "org_a", "person:kp_1@org_a")
    assert (ours.role, ours.org, ours.actor) == ("admin", None, f"person:kp_1@{VENDOR}")


def test_a_rule_for_members_may_be_of_one_org():
    with pytest.raises(AccessDenied):
        caller({"permissions": ["read"]}, rule("read", "member", org="org_b"))
    assert caller({"permissions": ["read"]}, rule("read", "member", org="org_a")).org == "org_a"


def test_the_default_role_is_in_the_own_org():
    assert caller({}, default_role="member").org == "org_a"
    with pytest.raises(AccessDenied, match="organisation"):
        caller({"org_code": None}, default_role="member")


def test_an_id_token_of_logto_names_the_only_org_of_a_person_in_a_list():
    settings = LoginSettings(issuer="main", client_id="console", default_role="member")
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(404)))
    issuer = Issuer("main", load("logto"), "https://acme.logto.app/oidc")
    login = Login(settings, issuer, client, lambda: "secret", clock=ManualClock())
    identity = {"sub": "p_1"}

    assert login._caller(identity, {"organizations": ["o1"]}).org == "o1"
    for orgs in ([], None):
        with pytest.raises(AccessDenied, match="names no organisation"):
            login._caller(identity, {"organizations": orgs})
    with pytest.raises(TokenRefused, match="several orgs"):
        login._caller(identity, {"organizations": ["o1", "o2"]})


def test_a_change_of_the_rules_changes_their_hash():
    rules = [
        LoginSettings(issuer="main", client_id="c", roles=[rule("x", role)]) for role in ("member", "manager")
    ]

    assert len({basis_of(one) for one in rules}) == 2
    assert basis_of(LoginSettings()) == ""


def test_a_profile_with_private_keys_cannot_log_people_in():
    issuer = kinde_issuer(profile=profile(client_authentication="private_key_jwt"))
    with pytest.raises(ConfigurationError, match="private key"):
        Login(LoginSettings(), issuer, httpx.AsyncClient(), lambda: "", clock=ManualClock())


@given(st.text(max_size=30) | st.text(alphabet="/\\:@.%#?&=ahttps \t\n", max_size=20))
def test_a_login_leads_to_a_path_of_this_console(text: str):
    place = local_path(text)

    assert place in (text, "/")
    assert urlsplit(urljoin("https://jobs.acme.com/login", place)).netloc == "jobs.acme.com"
    assert place.startswith("/") and not place.startswith(("//", "/\\"))
