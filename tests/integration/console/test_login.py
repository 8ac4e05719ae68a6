"""People log in at the identity provider: the whole flow over HTTP, and each way to abuse it.

A security test has a control: the same steps without the attack, which log in.
"""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from sqlalchemy import select

from tests.fakes.clock import ManualClock
from tests.integration.console.conftest import BASE, Site, csrf_of, on_either
from worker.demo.people import Person, WebApplication
from worker.demo.provider import Fault, Provider
from worker.errors import ConfigurationError
from worker.features.console.login import LASTS, MAX_TRANSACTIONS, Login, basis_of, local_path
from worker.features.console.operators import make_link
from worker.features.console.sessions import LOGIN_COOKIE, SESSION_COOKIE
from worker.guard.issuer import Issuer
from worker.guard.profile import load
from worker.operations.orgs import set_org_state
from worker.outbound import open_client
from worker.settings.sections import LoginSettings
from worker.store import tables
from worker.store.database import Database

PROVIDER = "http://127.0.0.1:9400"
AUDIENCE = "https://api.acme.com"
CLIENT = "console"
SECRET = "s3cret-of-the-console"
SUPPORT = {"claim": "permissions", "value": "jobs:support", "role": "operator", "org": "org_vendor"}
MANAGES = {"claim": "permissions", "value": "jobs:manage", "role": "manager"}
READS = {"claim": "permissions", "value": "jobs:read", "role": "member"}
PEOPLE = (
    Person("kp_ann", "Ann", "ann@a.example", "org_a", ("jobs:read",)),
    Person("kp_max", "Max", "max@a.example", "org_a", ("jobs:manage",)),
    # A customer can grant any permission within its own org.
    Person("kp_eve", "Eve", "eve@a.example", "org_a", ("jobs:support", "jobs:read")),
    Person("kp_sue", "Sue", "sue@vendor.example", "org_vendor", ("jobs:support",)),
    Person("kp_non", "Non", "non@a.example", "org_a"),
    Person("kp_unk", "Unk", "unk@q.example", "org_q", ("jobs:read",)),
)


class Portal:
    """The console, the provider, and the browsers of people."""

    def __init__(self, site: Site, clock: ManualClock) -> None:
        self.site = site
        self.provider = Provider(PROVIDER, clock=clock)
        for person in PEOPLE:
            self.provider.people.add(person)
        self.provider.people.add_application(
            WebApplication(CLIENT, SECRET, (f"{BASE}/login/callback",), (f"{BASE}/login",))
        )
        self.http = open_client(httpx.ASGITransport(self.provider.asgi()))
        self.configure()

    def configure(self, *, secret: Callable[[], str] = lambda: SECRET, **changes: Any) -> None:
        """The login as `[web.login]` has it."""
        values: dict[str, Any] = {"issuer": "main", "client_id": CLIENT, "roles": [SUPPORT, MANAGES, READS]}
        rules = LoginSettings(**values | changes)
        issuer = Issuer("main", load("kinde"), PROVIDER, audience=AUDIENCE)
        self.site.login = Login(rules, issuer, self.http, secret, clock=self.site.clock)
        self.site.login_basis = basis_of(rules)

    async def at_provider(self, url: str, sub: str) -> str:
        """Choose a person at the provider; the URL of the callback."""
        page = await self.http.get(url)
        assert page.status_code == 200, page.text
        form = {
            html.unescape(name): html.unescape(value)
            for name, value in re.findall(r'type="hidden" name="([^"]*)" value="([^"]*)"', page.text)
        }
        chosen = await self.http.post(f"{PROVIDER}/oauth2/auth", data=form | {"person": sub})
        assert chosen.status_code == 303
        return str(chosen.headers["location"])

    async def begin(self, browser: httpx.AsyncClient, return_to: str = "") -> str:
        """Press `Log in with …`; the URL at the provider."""
        page = await browser.get("/login", params={"return_to": return_to} if return_to else None)
        link = html.unescape(re.search(r'href="(/login/start[^"]*)"', page.text)[1])  # type: ignore[index]
        answer = await browser.get(link)
        assert answer.status_code == 303, answer.text
        return str(answer.headers["location"])

    async def log_in(self, browser: httpx.AsyncClient, sub: str, return_to: str = "") -> httpx.Response:
        callback = await self.at_provider(await self.begin(browser, return_to), sub)
        return await browser.get(callback)


@pytest.fixture
async def portal(site: Site, clock: ManualClock) -> AsyncIterator[Portal]:
    made = Portal(site, clock)
    yield made
    if site.login is not None:
        await site.login.close()
    await made.http.aclose()


def rows(database: Database, table: Any) -> list[Any]:
    with database.autocommit() as connection:
        return list(connection.execute(select(table)).all())


@on_either
async def test_the_login_page_names_the_provider_and_the_command_for_operators(portal: Portal):
    page = await portal.site.get("/login")

    title = re.search(r'href="/login/start">Log in with ([^<]+)</a>', page.text)
    assert title is not None
    assert (
        f"<code>orgworker operators add NAME</code> makes a token. Everybody else logs in with {title[1]}."
        in page.text
    )
    assert "<code>orgworker login</code>" in page.text
    assert "No identity provider is set up" not in page.text


async def test_a_member_sees_its_own_org_and_no_other(portal: Portal):
    async with portal.site.client() as browser:
        answer = await portal.log_in(browser, "kp_ann", "/orgs/org_a")

        assert (answer.status_code, answer.headers["location"]) == (303, "/orgs/org_a")
        page = await browser.get("/orgs/org_a")
        assert page.status_code == 200
        assert "person:kp_ann@org_a (member)" in page.text
        assert [(await browser.get(path)).status_code for path in ("/orgs/org_b", "/api/v1/runs")] == [
            404,
            401,
        ]
        form, headers = {"csrf": csrf_of(page)}, {"origin": BASE}
        run = await browser.post("/orgs/org_a/definitions/digest/run", data=form, headers=headers)
        assert run.status_code == 403
    stored = repr(rows(portal.site.database, tables.sessions))
    assert all(token not in stored for token in portal.provider.issued)
    assert rows(portal.site.database, tables.login_transactions) == []


async def test_a_person_of_several_orgs_chooses_one(portal: Portal):
    async with portal.site.client() as browser:
        page = await browser.get("/login", params={"org": "org_b", "return_to": "/search"})
        link = html.unescape(re.search(r'href="(/login/start[^"]*)"', page.text)[1])  # type: ignore[index]
        asked = parse_qs(urlsplit((await browser.get(link)).headers["location"]).query)
        plain = parse_qs(urlsplit(await portal.begin(browser)).query)
        wrong = await browser.get("/login/start", params={"org": "a b"})

        # The wish decides nothing: the token does.
        await portal.log_in(browser, "kp_ann")
        assert "as a member of org_b" in page.text
        assert "person:kp_ann@org_a (member)" in (await browser.get("/orgs/org_a")).text
    assert asked["org_code"] == ["org_b"]
    assert "org_code" not in plain
    assert wrong.status_code == 400


async def test_the_request_has_state_nonce_and_a_challenge_and_the_exact_address(portal: Portal):
    async with portal.site.client() as browser:
        asked = parse_qs(urlsplit(await portal.begin(browser)).query)

    assert asked["redirect_uri"] == [f"{BASE}/login/callback"]
    assert asked["code_challenge_method"] == ["S256"]
    assert {"state", "nonce", "code_challenge"} <= set(asked)
    assert "acr_values" not in asked
    stored = repr(rows(portal.site.database, tables.login_transactions))
    assert asked["state"][0] not in stored


@on_either
async def test_a_login_through_two_workers_works(portal: Portal):
    """Without sticky sessions: begun in one process, completed in another, used in a third."""
    async with portal.site.client() as one, portal.site.client() as two, portal.site.client() as three:
        callback = await portal.at_provider(await portal.begin(one), "kp_ann")
        two.cookies = one.cookies
        assert (await two.get(callback)).status_code == 303
        three.cookies = two.cookies

        assert (await three.get("/orgs/org_a")).status_code == 200


async def test_a_manager_may_do_what_the_portal_allows(portal: Portal):
    headers = {"origin": BASE}
    statuses = {}
    for may in (("run", "retry"), ("pause",)):
        portal.site.portal = may
        async with portal.site.client() as browser:
            await portal.log_in(browser, "kp_max")
            form = {"csrf": csrf_of(await browser.get("/orgs/org_a"))}
            for org in ("org_a", "org_b"):
                answer = await browser.post(f"/orgs/{org}/definitions/digest/run", data=form, headers=headers)
                statuses[may, org] = answer.status_code

    assert statuses == {
        (("run", "retry"), "org_a"): 303,
        (("run", "retry"), "org_b"): 404,
        (("pause",), "org_a"): 403,
        (("pause",), "org_b"): 404,
    }


async def test_a_customer_that_grants_itself_the_operators_permission_gets_no_other_org(portal: Portal):
    async with portal.site.client() as customer, portal.site.client() as operator:
        await portal.log_in(customer, "kp_eve")
        page = await customer.get("/orgs/org_a")
        assert "(member)" in page.text
        assert (await customer.get("/orgs/org_b")).status_code == 404
        # The control: the same permission in the operator's own org, which need not be an org here.
        await portal.log_in(operator, "kp_sue")
        assert "person:kp_sue@org_vendor (operator)" in (await operator.get("/orgs/org_b")).text


@pytest.mark.parametrize("sub", ["kp_non", "kp_unk", ""])
async def test_without_a_role_or_a_known_org_or_consent_there_is_no_session(portal: Portal, sub: str):
    async with portal.site.client() as browser:
        answer = await portal.log_in(browser, sub)

        assert answer.status_code == 403
        assert SESSION_COOKIE not in answer.headers.get("set-cookie", "")
    assert rows(portal.site.database, tables.sessions) == []


async def test_default_role_lets_in_members_of_known_orgs_only(portal: Portal):
    portal.configure(default_role="member")
    async with portal.site.client() as browser:
        assert (await portal.log_in(browser, "kp_non")).status_code == 303
        assert (await portal.log_in(browser, "kp_unk")).status_code == 403


class TestAttacks:
    async def test_a_forged_state_and_a_login_begun_in_another_browser_are_refused(self, portal: Portal):
        """Login CSRF: the attacker's own login, completed in the browser of the victim."""
        async with portal.site.client() as attacker, portal.site.client() as victim:
            callback = await portal.at_provider(await portal.begin(attacker), "kp_eve")
            await victim.get("/login")
            forged = callback.replace(parse_qs(urlsplit(callback).query)["state"][0], "x" * 43)
            for browser, url in ((victim, callback), (attacker, forged), (portal.site.client(), callback)):
                answer = await browser.get(url)
                assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
            # The control: the attacker's own browser, which began it.
            assert (await attacker.get(callback)).status_code == 303

    async def test_a_callback_works_once(self, portal: Portal):
        async with portal.site.client() as browser:
            callback = await portal.at_provider(await portal.begin(browser), "kp_ann")
            cookies = dict(browser.cookies)
            assert (await browser.get(callback)).status_code == 303
            browser.cookies.clear()
            browser.cookies.update(cookies)

            assert (await browser.get(callback)).status_code == 403

    async def test_a_code_of_another_login_is_refused_by_its_verifier(self, portal: Portal):
        async with portal.site.client() as attacker, portal.site.client() as victim:
            stolen = await portal.at_provider(await portal.begin(victim), "kp_ann")
            mine = await portal.at_provider(await portal.begin(attacker), "kp_eve")
            codes = [parse_qs(urlsplit(url).query)["code"][0] for url in (stolen, mine)]
            answer = await attacker.get(mine.replace(codes[1], codes[0]))

        assert (answer.status_code, "does not accept the code" in answer.text) == (403, True)

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (Fault(replace={"nonce": "of-another-login"}), "nonce"),
            (Fault(drop=("nonce",)), "nonce"),
            (Fault(replace={"aud": ["another-client"]}), "audience"),
            (Fault(replace={"aud": [CLIENT, "another-client"]}), "audience_wider"),
            (Fault(replace={"azp": "another-client"}), "azp"),
            (Fault(replace={"iss": "http://127.0.0.1:9401"}), "issuer"),
            (Fault(forged=True), "signature"),
            (Fault(age=7200), "expired"),
            (Fault(drop=("sub",)), "sub"),
            (Fault(typ="at+jwt"), "type"),
            (Fault(replace={"org_code": ["org_a"]}), "org_type"),
            (Fault(drop=("org_code",)), "names no organisation"),
        ],
    )
    async def test_an_id_token_that_is_not_for_this_login_is_refused(
        self, portal: Portal, fault: Fault, said: str
    ):
        portal.provider.misbehave(fault)
        async with portal.site.client() as browser:
            answer = await portal.log_in(browser, "kp_ann")
            assert (answer.status_code, said in answer.text) == (403, True), answer.text
            portal.provider.misbehave(None)
            assert (await portal.log_in(browser, "kp_ann")).status_code == 303

    async def test_an_id_token_may_name_the_provider_beside_us(self, portal: Portal):
        portal.provider.misbehave(Fault(replace={"aud": [PROVIDER, CLIENT]}))
        async with portal.site.client() as browser:
            assert (await portal.log_in(browser, "kp_ann")).status_code == 303

    async def test_an_answer_of_another_provider_is_refused(self, portal: Portal):
        async with portal.site.client() as browser:
            callback = await portal.at_provider(await portal.begin(browser), "kp_ann")
            answer = await browser.get(callback.replace("9400", "9401"))

        assert (answer.status_code, "nother provider" in answer.text) == (403, True)

    @pytest.mark.parametrize(
        "place",
        [
            "https://evil.example/",
            "//evil.example/",
            "/\\evil.example/",
            "/%0d%0aset-cookie:x",
            "javascript:alert(1)",
            "/login/start",
            "/ok\nx",
            "",
        ],
    )
    async def test_a_login_never_leads_elsewhere(self, portal: Portal, place: str):
        if place.startswith("/%0d"):
            assert local_path(place) == place
            return
        async with portal.site.client() as browser:
            answer = await portal.log_in(browser, "kp_ann", place)

        assert (answer.status_code, answer.headers["location"]) == (303, "/")

    async def test_a_host_that_is_not_ours_gets_no_login(self, portal: Portal):
        """Without `public_url` the address would be whatever the Host header says."""
        async with portal.site.client(base="http://evil.example") as browser:
            assert (await browser.get("/login/start")).status_code == 403
        portal.site.public_url = BASE
        async with portal.site.client(base="http://evil.example") as browser:
            answer = await browser.get("/login/start")
            assert parse_qs(urlsplit(answer.headers["location"]).query)["redirect_uri"] == [
                f"{BASE}/login/callback"
            ]


@on_either
async def test_a_suspended_orgs_people_are_out_at_once_and_may_not_return(portal: Portal):
    async with portal.site.client() as browser:
        await portal.log_in(browser, "kp_ann")
        set_org_state(portal.site.database, "org_a", "suspended", actor="tester")

        assert (await browser.get("/orgs/org_a")).status_code == 401
        assert (await portal.log_in(browser, "kp_ann")).status_code == 403
        set_org_state(portal.site.database, "org_a", "active", actor="tester")
        assert (await browser.get("/orgs/org_a")).status_code == 401


async def test_changed_rules_end_the_sessions_that_rest_on_them(portal: Portal):
    async with portal.site.client() as browser:
        await portal.log_in(browser, "kp_sue")
        cookies = browser.cookies
    portal.configure(roles=[READS])
    async with portal.site.client() as browser:
        browser.cookies = cookies

        assert (await browser.get("/orgs/org_a")).status_code == 401


async def test_logins_that_have_begun_are_bounded_and_expire(portal: Portal):
    async with portal.site.client() as browser:
        first = await portal.at_provider(await portal.begin(browser), "kp_ann")
        for _ in range(MAX_TRANSACTIONS):
            portal.site.clock.advance(1)
            last = await portal.begin(browser)
        assert len(rows(portal.site.database, tables.login_transactions)) == MAX_TRANSACTIONS
        assert (await browser.get(first)).status_code == 403
        callback = await portal.at_provider(last, "kp_ann")
        portal.site.clock.advance(LASTS.total_seconds())

        assert (await browser.get(callback)).status_code == 403


async def test_claims_of_the_access_token_are_verified_for_the_audience(portal: Portal):
    portal.configure(claims_from="access_token")
    async with portal.site.client() as browser:
        url = await portal.begin(browser)
        assert parse_qs(urlsplit(url).query)["audience"] == [AUDIENCE]
        assert (await browser.get(await portal.at_provider(url, "kp_ann"))).status_code == 303
        portal.provider.misbehave(Fault(replace={"aud": [CLIENT]}))

        assert (await portal.log_in(browser, "kp_ann")).status_code == 403


async def test_acr_and_auth_time_are_checked_only_if_configured(portal: Portal):
    stale = Fault(replace={"auth_time": 1})
    portal.provider.misbehave(stale)
    async with portal.site.client() as browser:
        assert (await portal.log_in(browser, "kp_ann")).status_code == 303
    portal.configure(max_age="10m", acr=["urn:mfa"])
    async with portal.site.client() as browser:
        seen = []
        for fault in (
            Fault(),
            Fault(replace={"acr": "urn:mfa", "auth_time": 1}),
            Fault(replace={"acr": "urn:mfa"}, drop=("auth_time",)),
            Fault(replace={"acr": "urn:mfa"}),
        ):
            portal.provider.misbehave(fault)
            seen.append((await portal.log_in(browser, "kp_ann")).status_code)
        asked = parse_qs(urlsplit(await portal.begin(browser)).query)

    assert seen == [403, 403, 403, 303]
    assert (asked["acr_values"], asked["max_age"]) == (["urn:mfa"], ["600"])


async def test_logging_out_ends_the_session_here_and_leads_to_the_provider(portal: Portal):
    async with portal.site.client() as browser:
        for more, location in (
            ({}, f"{PROVIDER}/logout?client_id={CLIENT}&redirect=http%3A%2F%2F127.0.0.1%3A8470%2Flogin"),
            ({"here": "1"}, "/"),
        ):
            await portal.log_in(browser, "kp_ann")
            page = await browser.get("/orgs/org_a")
            # Else the browser would block the way from our form to the provider.
            assert f"form-action 'self' {PROVIDER};" in page.headers["content-security-policy"]
            key = browser.cookies[SESSION_COOKIE]
            form = {"csrf": csrf_of(page)} | more
            out = await browser.post("/logout", data=form, headers={"origin": BASE})
            assert (out.status_code, out.headers["location"]) == (303, location)
            gone = await browser.get("/orgs/org_a", headers={"cookie": f"{SESSION_COOKIE}={key}"})
            assert gone.status_code == 401


class TestCallback:
    """Whoever opens the address of the callback, in whatever state: a page that says what to do."""

    # The query, and what the page says; CODE and STATE are those of a login that has begun.
    REFUSED = (
        ("", "begun no such login"),
        ("state=", "begun no such login"),
        ("state=x", "begun no such login"),
        ("state=x&code=CODE", "begun no such login"),
        ("state=%ff%fe%00&code=%00", "begun no such login"),
        (f"state={'x' * 8000}", "begun no such login"),
        ("state=STATE&state=x&code=CODE", "begun no such login"),
        ("state=STATE", "sent no code"),
        ("state=STATE&code=", "sent no code"),
        ("state=STATE&code=a%20b", "sent no code"),
        (f"state=STATE&code={'x' * 2049}", "sent no code"),
        ("state=STATE&code=another", "does not accept the code"),
        ("state=STATE&error=access_denied", "did not log you in: access_denied"),
        ("state=STATE&error=%3Cscript%3E", "did not log you in: an unknown error"),
        ("state=STATE&code=CODE&iss=http://127.0.0.1:9401", "nother provider"),
    )
    COOKIES = ("", "x", "\xff\xfe", "y" * 43)

    async def opened(self, portal: Portal, query: str, cookie: str | None) -> httpx.Response:
        """Begin a login and open the callback with this query; `cookie` in place of the browser's."""
        async with portal.site.client() as browser:
            given = parse_qs(urlsplit(await portal.at_provider(await portal.begin(browser), "kp_ann")).query)
            query = query.replace("STATE", given["state"][0]).replace("CODE", given["code"][0])
            headers = {}
            if cookie is not None:
                browser.cookies.clear()
                headers = {"cookie": f"{LOGIN_COOKIE}={cookie}".encode("latin-1")} if cookie else {}
            return await browser.get(f"/login/callback?{query}", headers=headers)  # type: ignore[arg-type]

    async def test_every_state_but_the_right_one_is_refused(self, portal: Portal):
        for query, said in self.REFUSED:
            answer = await self.opened(portal, query, None)
            assert (answer.status_code, said in answer.text) == (403, True), (query, answer.text)
            assert SESSION_COOKIE not in answer.headers.get("set-cookie", "")
        for cookie in self.COOKIES:
            answer = await self.opened(portal, "state=STATE&code=CODE", cookie)
            assert (answer.status_code, "begun no such login" in answer.text) == (403, True), cookie
        # The control: the browser that began it, with what the provider sent.
        assert (await self.opened(portal, "state=STATE&code=CODE", None)).status_code == 303
        assert rows(portal.site.database, tables.sessions) != []

    async def test_without_a_provider_there_is_no_such_page(self, portal: Portal):
        login, portal.site.login = portal.site.login, None
        async with portal.site.client() as browser:
            for query, _ in self.REFUSED:
                assert (await browser.get(f"/login/callback?{query}")).status_code == 404
            assert (await browser.get("/login/start")).status_code == 404
            assert (await browser.post("/login/callback")).status_code == 405
        portal.site.login = login

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(status=500),
            Fault(status=502, body="<html>Bad gateway</html>"),
            Fault(status=429, headers={"retry-after": "30"}),
            Fault(status=302, headers={"location": "https://evil.example/"}),
            Fault(status=200, body="<html>Down for maintenance</html>"),
            Fault(status=200, body="[]"),
            Fault(status=200, body=""),
            Fault(status=200, body=" " * 70_000),
        ],
        ids=lambda fault: f"{fault.status}-{(fault.body or '')[:6]}",
    )
    async def test_a_provider_that_is_down_is_said_to_be(self, portal: Portal, fault: Fault):
        portal.provider.misbehave(fault)
        self.is_said_to_be_down(await self.opened(portal, "state=STATE&code=CODE", None))
        portal.provider.misbehave(None)
        portal.provider.jwks_fault = fault
        self.is_said_to_be_down(await self.opened(portal, "state=STATE&code=CODE", None))
        assert rows(portal.site.database, tables.sessions) == []

    async def test_a_provider_without_a_discovery_document_is_said_to_be_down(self, portal: Portal):
        """Also to a worker that completes a login which another one has begun."""
        async with portal.site.client() as browser:
            callback = await portal.at_provider(await portal.begin(browser), "kp_ann")

            def refuse(request: httpx.Request) -> httpx.Response:
                raise httpx.ConnectError("connection refused", request=request)

            async with open_client(httpx.MockTransport(refuse)) as nothing:
                portal.http, former = nothing, portal.http
                portal.configure()
                async with portal.site.client() as other:
                    other.cookies = browser.cookies
                    self.is_said_to_be_down(await other.get("/login/start"))
                    self.is_said_to_be_down(await other.get(callback))
                # Not there: logging out here works all the same.
                assert portal.site.login is not None
                assert await portal.site.login.end_url(BASE) is None
                await portal.site.login.close()
                portal.http = former
                portal.configure()

    async def test_a_secret_that_is_gone_is_no_error_of_the_server(self, portal: Portal):
        def gone() -> str:
            raise ConfigurationError("web.login: the secret login__main cannot be read: no such file")

        portal.configure(secret=gone)
        answer = await self.opened(portal, "state=STATE&code=CODE", None)

        self.is_said_to_be_down(answer)
        assert "login__main" not in answer.text

    def is_said_to_be_down(self, answer: httpx.Response) -> None:
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
        assert "Kinde cannot log you in right now" in answer.text
        assert SESSION_COOKIE not in answer.headers.get("set-cookie", "")


class TestLinks:
    """The link of a terminal: once, for ten minutes, from this machine, by a button."""

    async def press(self, browser: httpx.AsyncClient, link: str) -> httpx.Response:
        page = await browser.get(link)
        assert page.status_code == 200
        return await browser.post(link, data={"csrf": csrf_of(page)}, headers={"origin": BASE})

    @on_either
    async def test_it_logs_in_once_and_only_its_hash_is_stored(self, site: Site):
        link = make_link(site.database, "ada", at=site.clock.now())
        code = link.rpartition("/")[2]
        assert code not in repr(rows(site.database, tables.login_transactions))
        async with site.client() as browser, site.client() as second:
            # Fetching it, as a preview does, uses nothing up.
            assert (await second.get(link)).status_code == 200
            answer = await self.press(browser, link)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            assert "operator:ada (terminal) (admin)" in (await browser.get("/")).text
            assert (await self.press(second, link)).status_code == 403

    async def test_it_expires(self, site: Site):
        link = make_link(site.database, "ada", at=site.clock.now())
        site.clock.advance(LASTS.total_seconds())
        async with site.client() as browser:
            assert (await self.press(browser, link)).status_code == 403

    async def test_it_is_for_this_machine_and_for_our_own_page(self, site: Site):
        link = make_link(site.database, "ada", at=site.clock.now())
        async with site.client() as browser:
            csrf = csrf_of(await browser.get(link))
            cookies = dict(browser.cookies)
            for form, headers in (
                ({"csrf": csrf}, {}),
                ({}, {"origin": BASE}),
                ({"csrf": "x"}, {"origin": BASE}),
            ):
                assert (await browser.post(link, data=form, headers=headers)).status_code == 403
            forwarded = {"origin": BASE, "x-forwarded-for": "198.51.100.1"}
            assert (await browser.post(link, data={"csrf": csrf}, headers=forwarded)).status_code == 403
        for options in ({"address": "198.51.100.1"}, {"base": "http://evil.example"}):
            async with site.client(**options) as elsewhere:
                elsewhere.cookies.update(cookies)
                assert (await elsewhere.get(link)).status_code == 403
                origin = {"origin": str(elsewhere.base_url).rstrip("/")}
                assert (await elsewhere.post(link, data={"csrf": csrf}, headers=origin)).status_code == 403
        # The control: nothing of this has used it up.
        async with site.client() as browser:
            assert (await self.press(browser, link)).status_code == 303
