"""Who counts as an org: one of its active credentials, or a token with the scope that the operator named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from tests.integration.web.conftest import BASE, Site
from worker.operations.credentials import add_credential, retire_credential
from worker.operations.org_state import set_org_state
from worker.store import orgs

pytestmark = pytest.mark.anyio
on_either = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)

PATHS = ("/api/v1/runs", "/api/v1/credentials", "/api/v1/audit", "/orgs/org_a")
RUN = "/api/v1/definitions/org_a/digest/run"
# A person who logged in to a single-page app of the same org.
PERSON: Mapping[str, Any] = {
    "sub": "kp_7",
    "azp": "spa",
    "gty": None,
    "scope": "openid profile email",
    "scp": ["openid", "profile", "email"],
}
STRANGERS: Mapping[str, Mapping[str, Any]] = {
    "a person": PERSON,
    "no client": {"azp": None},
    "another org's client": {"azp": "m2m-org_b"},
    "an unknown client": {"azp": "m2m-org_q"},
    "no client and no scope": {"azp": None, "scp": None, "scope": None},
}


def with_scopes(*scopes: str) -> dict[str, Any]:
    """A person's claims with these scopes."""
    return {**PERSON, "scope": " ".join(scopes), "scp": list(scopes)}


@on_either
@pytest.mark.parametrize("stranger", list(STRANGERS))
async def test_a_good_token_that_no_active_credential_got_is_401_with_the_reason(site: Site, stranger: str):
    token = site.token("org_a", **STRANGERS[stranger])
    for path in PATHS:
        answer = await site.get(path, token)
        assert answer.status_code == 401, path
        if path.startswith("/api"):
            assert "not an active credential of org org_a" in answer.json()["error"]["message"]
    answer = await site.post(RUN, token)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token")
    assert "web.org_scope" in answer.json()["error"]["fix"]
    async with site.client() as client:
        opened = await client.post("/login", data={"token": token}, headers={"origin": BASE})
        assert (opened.status_code, "set-cookie" in opened.headers) == (401, False)


async def test_the_same_org_is_let_in_by_its_own_credential_with_any_scope(site: Site):
    """The control: only the client is other than the strangers'."""
    for token in (site.token("org_a"), site.token("org_a", scp=[], scope=None, sub="m2m")):
        assert [(await site.get(path, token)).status_code for path in PATHS] == [200] * 4
    assert (await site.post(RUN, site.token("org_a"))).status_code == 201


async def test_a_scope_that_the_operator_names_lets_in_a_token_of_the_org_alone(site: Site):
    site.org_scope = "jobs:read"
    person = with_scopes("openid", "jobs:read")

    assert (await site.get("/api/v1/runs", site.token("org_a", **person))).status_code == 200
    assert (await site.get("/api/v1/runs?org=org_b", site.token("org_a", **person))).status_code == 404
    for scopes in (["openid"], ["jobs"], ["jobs:read:all"], []):
        token = site.token("org_a", **with_scopes(*scopes))
        assert (await site.get("/api/v1/runs", token)).status_code == 401, scopes


async def test_no_scope_lets_anybody_in_while_none_is_named(site: Site):
    token = site.token("org_a", **with_scopes("", "jobs:read"))

    assert (await site.get("/api/v1/runs", token)).status_code == 401


async def test_of_several_credentials_each_active_one_is_good_and_a_retired_one_at_once_not(site: Site):
    add_credential(site.database, None, "org_a", client_id="m2m-new", actor="tester", reference="new-secret")
    old, new = site.token("org_a"), site.token("org_a", azp="m2m-new")

    assert [(await site.get("/api/v1/runs", token)).status_code for token in (old, new)] == [200, 200]
    retire_credential(site.database, "org_a", 1, actor="tester")
    assert [(await site.get("/api/v1/runs", token)).status_code for token in (old, new)] == [401, 200]


class TestSessions:
    """A session is worth what its token would be worth now."""

    async def opened(self, site: Site, **claims: Any) -> httpx.AsyncClient:
        client = site.client()
        answer = await client.post(
            "/login", data={"token": site.token("org_a", **claims)}, headers={"origin": BASE}
        )
        assert answer.status_code == 303
        assert (await client.get("/orgs/org_a")).status_code == 200
        return client

    @on_either
    async def test_a_suspended_orgs_session_is_denied_at_once_and_is_over(self, site: Site):
        client = await self.opened(site)

        set_org_state(site.database, "org_a", "suspended", actor="tester")
        denied = await client.get("/orgs/org_a")
        set_org_state(site.database, "org_a", "active", actor="tester")

        assert denied.status_code == 403
        assert (await client.get("/orgs/org_a")).status_code == 401

    @on_either
    async def test_the_session_of_a_retired_credential_is_over_at_once(self, site: Site):
        client = await self.opened(site)

        retire_credential(site.database, "org_a", 1, actor="tester")

        assert (await client.get("/orgs/org_a")).status_code == 401

    async def test_a_session_by_scope_outlives_a_credential_it_does_not_rest_on(self, site: Site):
        site.org_scope = "jobs:read"
        client = await self.opened(site, **with_scopes("jobs:read"))

        retire_credential(site.database, "org_a", 1, actor="tester")

        assert (await client.get("/orgs/org_a")).status_code == 200

    async def test_a_paused_org_still_sees_its_page(self, site: Site):
        client = await self.opened(site)

        set_org_state(site.database, "org_a", "paused", actor="tester")

        assert (await client.get("/orgs/org_a")).status_code == 200


@on_either
async def test_one_query_says_org_issuer_state_and_credential(site: Site):
    with site.database.autocommit() as connection:
        found = orgs.find_caller(connection, "org_a", "m2m-org_a")
        assert found is not None
        assert (found.issuer, found.state, found.is_credential) == ("main", "active", True)
        for client_id in ("", "m2m-org_b", "M2M-org_a", "m2m-org_a ", "%"):
            other = orgs.find_caller(connection, "org_a", client_id)
            assert other is not None
            assert not other.is_credential, client_id
        assert orgs.find_caller(connection, "org_z", "m2m-org_a") is None
