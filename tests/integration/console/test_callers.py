"""Who counts as an org: one of its active credentials, or a token with the scope that the operator named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from tests.integration.console.conftest import BASE, TOKENS, Site, csrf_of, log_in, on_either
from worker.features.console.access import Access
from worker.features.console.callers import Caller
from worker.features.console.sessions import SESSION_COOKIE, Sessions
from worker.ids import ALL_ORGS
from worker.operations.credentials import add_credential, retire_credential
from worker.operations.definitions import edit_definition
from worker.operations.orgs import set_org_state
from worker.store import orgs, tables
from worker.store.lists import RUNS
from worker.store.lists.read import read

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
        opened = await log_in(client, token)
        assert (opened.status_code, SESSION_COOKIE in opened.headers["set-cookie"]) == (401, False)


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


def again(site: Site, browser: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same browser at a process with the settings of now."""
    client = site.client()
    client.cookies = browser.cookies
    return client


async def run_by_form(client: httpx.AsyncClient) -> httpx.Response:
    """Send the form that runs the definition now."""
    csrf = csrf_of(await client.get("/orgs/org_a"))
    form = {"csrf": csrf}
    return await client.post("/orgs/org_a/definitions/digest/run", data=form, headers={"origin": BASE})


class TestSessions:
    """A session is worth what its token would be worth now."""

    async def opened(self, site: Site, **claims: Any) -> httpx.AsyncClient:
        client = site.client()
        answer = await log_in(client, site.token("org_a", **claims))
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

    async def test_a_session_follows_the_role_of_orgs(self, site: Site, monkeypatch: pytest.MonkeyPatch):
        opened = await self.opened(site)

        site.org_role = "viewer"
        lowered = again(site, opened)
        assert "Run now" not in (await lowered.get("/orgs/org_a/definitions/digest")).text
        assert (await run_by_form(lowered)).status_code == 403
        site.org_role = "operator"
        assert (await run_by_form(again(site, opened))).status_code == 303

        # The control: with the role of the login, a lowered setting changes nothing.
        site.org_role = "viewer"
        monkeypatch.setattr(Access, "confirm_session", Access.confirm)
        assert (await run_by_form(again(site, opened))).status_code == 303

    @pytest.mark.parametrize("now", ["", "jobs:write"])
    async def test_a_session_by_scope_ends_with_the_scope(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, now: str
    ):
        site.org_scope = "jobs:read"
        opened = await self.opened(site, **with_scopes("jobs:read"))

        site.org_scope = now
        with monkeypatch.context() as undefended:
            # The control: what the row says of the scope is what the setting was.
            undefended.setattr(Access, "confirm_session", Access.confirm)
            assert (await again(site, opened).get("/orgs/org_a")).status_code == 200
        assert (await again(site, opened).get("/orgs/org_a")).status_code == 401

    async def test_a_scope_set_later_gives_no_session_what_its_token_was_not_asked_for(self, site: Site):
        opened = await self.opened(site, scope="jobs:read", scp=["jobs:read"])
        retire_credential(site.database, "org_a", 1, actor="tester")

        site.org_scope = "jobs:read"

        assert (await again(site, opened).get("/orgs/org_a")).status_code == 401

    @on_either
    async def test_a_session_of_the_previous_release_rests_on_its_credential_alone(self, site: Site):
        """Its row does not say which scope its token had."""
        site.org_scope = "jobs:read"
        program = await self.opened(site, scope="jobs:read", scp=["jobs:read"])
        stranger = await self.opened(site, **with_scopes("jobs:read"))
        # The control: as this release writes them, both are admitted by the scope.
        assert [(await each.get("/orgs/org_a")).status_code for each in (program, stranger)] == [200, 200]
        with site.database.transaction() as connection:
            connection.execute(update(tables.sessions).values(basis=""))

        assert [(await each.get("/orgs/org_a")).status_code for each in (program, stranger)] == [200, 401]
        retire_credential(site.database, "org_a", 1, actor="tester")
        assert (await program.get("/orgs/org_a")).status_code == 401

    async def test_a_persons_role_is_that_of_the_login_rules(self, site: Site):
        """`org_role` is for programs: it makes no member an operator."""
        site.login_basis = "rules"
        person = Caller(
            *("ann", "member"),
            org="org_a",
            kind="person",
            issuer="main",
            subject="1",
            home="org_a",
            basis="rules",
        )
        session = await Sessions(site.database, site.clock).begin(person)
        client = site.client()
        client.cookies.set(SESSION_COOKIE, session.key)

        assert (await client.get("/orgs/org_a")).status_code == 200
        assert (await run_by_form(client)).status_code == 403
        site.login_basis = "other rules"
        assert (await again(site, client).get("/orgs/org_a")).status_code == 401

    async def test_a_paused_org_still_sees_its_page(self, site: Site):
        client = await self.opened(site)

        set_org_state(site.database, "org_a", "paused", actor="tester")

        assert (await client.get("/orgs/org_a")).status_code == 200


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


class TestParamsByHand:
    """An org that acts gives only the params that the operator lets it give."""

    @pytest.fixture
    def chosen(self, staffed: Site) -> Site:
        """A definition with a param of its own and one that its org may give."""
        changes = {"params": {"url": "https://api.acme.com/x"}, "params_by_hand": ["collection"]}
        edit_definition(staffed.database, "org_a", "digest", changes, actor="tester")
        return staffed

    async def run(self, site: Site, token: str, **params: Any) -> httpx.Response:
        return await site.post(RUN, token, json={"params": params})

    async def params_of(self, site: Site, run: str) -> Any:
        return (await site.get(f"/api/v1/runs/{run}", TOKENS["admin"])).json()["params"]

    def count(self, site: Site) -> int:
        with site.database.autocommit() as connection:
            return len(read(connection, RUNS, ALL_ORGS))

    async def test_what_is_listed_may_be_given_and_nothing_else(self, chosen: Site):
        token = chosen.token("org_a")

        made = await self.run(chosen, token, collection="faq")
        refused = [
            await self.run(chosen, token, url="http://127.0.0.1:19555/internal"),
            await self.run(chosen, token, collection="faq", url="https://api.acme.com/x"),
            await self.run(chosen, token, Collection="faq"),
        ]

        assert made.status_code == 201
        given = await self.params_of(chosen, made.json()["id"])
        assert given == {"url": "https://api.acme.com/x", "collection": "faq"}
        for answer, name in zip(refused, ("url", "url", "Collection"), strict=True):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "denied")
            assert repr(name) in error["message"]
            assert "collection" in error["fix"]
        assert self.count(chosen) == 1

    async def test_nothing_is_listed_by_default_and_no_params_need_no_list(self, site: Site):
        token = site.token("org_a")

        assert (await self.run(site, token, collection="faq")).status_code == 403
        assert (await self.run(site, token)).status_code == 201
        assert (await site.post(RUN, token)).status_code == 201

    async def test_an_operator_may_give_any(self, chosen: Site):
        made = await self.run(chosen, TOKENS["operator"], url="https://api.acme.com/y")

        assert (await self.params_of(chosen, made.json()["id"]))["url"] == "https://api.acme.com/y"

    async def test_a_key_that_made_a_run_does_not_open_the_way(self, chosen: Site):
        token, headers = chosen.token("org_a"), {"idempotency-key": "k"}
        assert (await chosen.post(RUN, token, headers=headers)).status_code == 201

        answer = await chosen.post(RUN, token, headers=headers, json={"params": {"url": "x"}})

        assert answer.status_code == 403

    async def test_a_retry_repeats_no_params_that_the_org_may_not_give(self, chosen: Site):
        """Such as those of a run that an org made before `params_by_hand` was there."""
        token = chosen.token("org_a")
        url = (await self.run(chosen, TOKENS["operator"], url="http://127.0.0.1/")).json()["id"]
        own = (await self.run(chosen, token, collection="faq")).json()["id"]
        for run in (url, own):
            assert (await chosen.post(f"/api/v1/runs/{run}/cancel", token)).status_code == 200

        refused = await chosen.post(f"/api/v1/runs/{url}/retry", token)
        retried = await chosen.post(f"/api/v1/runs/{own}/retry", token)
        by_operator = await chosen.post(f"/api/v1/runs/{url}/retry", TOKENS["operator"])

        assert (refused.status_code, "'url'" in refused.json()["error"]["message"]) == (403, True)
        assert (retried.status_code, by_operator.status_code) == (201, 201)

    async def test_the_dashboard_goes_through_the_same_check(self, chosen: Site):
        url = (await self.run(chosen, TOKENS["operator"], url="http://127.0.0.1/")).json()["id"]
        await chosen.post(f"/api/v1/runs/{url}/cancel", TOKENS["operator"])
        async with chosen.client() as client:
            await log_in(client, chosen.token("org_a"))
            page = await client.get(f"/runs/{url}")
            form = {"csrf": csrf_of(page)}
            answer = await client.post(f"/runs/{url}/retry", data=form, headers={"origin": BASE})

        assert (answer.status_code, "url" in answer.text) == (403, True)
