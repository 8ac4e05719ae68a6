"""Logins and calls are limited by address and by caller; metrics that name orgs are for operators."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.integration.console.conftest import TOKENS, Site, csrf_of, log_in
from worker.kit.web.clients import ClientLimits
from worker.settings.sections import WebSettings

RUNS = "/api/v1/runs"


@pytest.fixture
def limited(staffed: Site) -> Site:
    """With the limits as they are by default, shared by all clients of the test."""
    web = WebSettings()
    staffed.limits = ClientLimits(
        staffed.clock, logins_per_minute=web.logins_per_minute, calls_per_second=web.calls_per_second
    )
    return staffed


@pytest.fixture
async def page(limited: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with limited.client(address="198.51.100.1") as client:
        yield client


async def statuses(site: Site, count: int, token: str | None, path: str = RUNS, **options: str) -> list[int]:
    async with site.client(token, **options) as client:
        return [(await client.get(path)).status_code for _ in range(count)]


class TestLogins:
    async def test_the_eleventh_of_a_minute_has_to_wait(self, limited: Site, page: httpx.AsyncClient):
        tried = [await log_in(page, f"guess {number}") for number in range(11)]

        assert [answer.status_code for answer in tried] == [401] * 10 + [429]
        assert tried[-1].headers["retry-after"] == "6"
        assert "too many logins from 198.51.100.1" in tried[-1].text.lower()
        # Not even the right one is tried.
        assert (await log_in(page, TOKENS["admin"])).status_code == 429
        limited.clock.advance(6)
        assert (await log_in(page, TOKENS["admin"])).status_code == 303

    async def test_a_page_elsewhere_uses_up_no_logins_of_its_visitor(self, page: httpx.AsyncClient):
        for _ in range(20):
            answer = await log_in(page, "guess", origin="https://evil.example")
            assert answer.status_code == 403

        assert (await log_in(page, TOKENS["viewer"])).status_code == 303

    async def test_a_login_is_one_login_whether_the_token_is_good_or_bad(self, page: httpx.AsyncClient):
        form = {"csrf": csrf_of(await page.get("/")), "token": TOKENS["viewer"]}
        cookie = page.cookies["orgworker_login"]
        headers = {"origin": str(page.base_url), "cookie": f"orgworker_login={cookie}"}
        page.cookies.clear()
        tried = [await page.post("/login", data=form, headers=headers) for _ in range(11)]

        assert [answer.status_code for answer in tried] == [303] * 10 + [429]


class TestBearerTokens:
    async def test_guessing_is_limited_by_address(self, limited: Site):
        seen = []
        for number in range(12):
            seen += await statuses(limited, 1, f"guess-{number}", address="198.51.100.1")

        assert seen == [401] * 10 + [429] * 2
        assert await statuses(limited, 1, TOKENS["admin"], address="198.51.100.1") == [429]
        assert await statuses(limited, 1, TOKENS["admin"], address="198.51.100.2") == [200]

    async def test_whoever_was_let_in_before_is_not_limited_by_what_others_guess(self, limited: Site):
        """Two customers may call from one address."""
        token = limited.token("org_a")
        assert await statuses(limited, 1, token) == [200]
        for number in range(20):
            await statuses(limited, 1, f"guess-{number}")

        assert await statuses(limited, 1, token) == [200]

    async def test_a_good_token_of_no_credential_is_no_guess(self, limited: Site):
        """It is limited as the caller that it is, and limits nobody else of its address."""
        stranger = limited.token("org_a", azp="spa")

        assert set(await statuses(limited, 60, stranger)) == {401, 429}
        assert await statuses(limited, 1, limited.token("org_b")) == [200]

    async def test_an_issuer_that_is_down_uses_up_no_logins(self, limited: Site):
        limited.issuer.keys = lambda: httpx.Response(500)
        assert await statuses(limited, 20, limited.token("org_a")) == [503] * 20

        assert await statuses(limited, 1, TOKENS["viewer"]) == [200]


class TestCalls:
    async def test_fifty_a_second_of_one_caller_and_the_next_has_to_wait(self, limited: Site):
        a, b = limited.token("org_a"), limited.token("org_b")

        assert await statuses(limited, 51, a) == [200] * 50 + [429]
        answer = await limited.get(RUNS, a)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_requests")
        assert answer.headers["retry-after"] == "1"
        # The same address, another caller.
        assert await statuses(limited, 1, b) == [200]
        assert await statuses(limited, 1, TOKENS["viewer"]) == [200]
        limited.clock.advance(1)
        assert await statuses(limited, 51, a) == [200] * 50 + [429]

    async def test_another_token_of_the_same_caller_does_not_help(self, limited: Site):
        seen = [(await limited.get(RUNS, limited.token("org_a", jti=f"j{n}"))).status_code for n in range(52)]

        assert seen == [200] * 50 + [429] * 2

    async def test_a_session_counts_as_its_caller(self, limited: Site, page: httpx.AsyncClient):
        await log_in(page, TOKENS["viewer"])
        seen = [(await page.get("/runs/x")).status_code for _ in range(55)]

        assert (seen[0], seen[-1]) == (404, 429)
        assert await statuses(limited, 1, TOKENS["viewer"]) == [429]
        assert await statuses(limited, 1, TOKENS["operator"]) == [200]

    @pytest.mark.parametrize("path", ["/", "/runs/x", RUNS, "/nothing"])
    async def test_requests_without_a_token_are_limited_by_address(self, limited: Site, path: str):
        seen = await statuses(limited, 55, None, path, address="198.51.100.1")

        assert seen == [401] * 50 + [429] * 5
        assert await statuses(limited, 1, None, path, address="198.51.100.2") == [401]
        assert await statuses(limited, 1, TOKENS["viewer"], address="198.51.100.1") == [200]

    async def test_health_is_never_limited(self, limited: Site):
        await statuses(limited, 60, None)

        for path in ("/livez", "/metrics"):
            assert set(await statuses(limited, 60, None, path)) == {200}


class TestBehindAProxy:
    @pytest.fixture
    def proxied(self, limited: Site) -> Site:
        limited.trusted_proxies = ("10.0.0.0/8",)
        return limited

    async def ask(self, site: Site, client: str | None, token: str) -> int:
        async with site.client(token, address="10.0.0.1") as through:
            headers = {} if client is None else {"x-forwarded-for": client}
            return (await through.get(RUNS, headers=headers)).status_code

    async def test_the_proxy_itself_is_exempt(self, proxied: Site):
        assert [await self.ask(proxied, None, f"guess-{n}") for n in range(30)] == [401] * 30

    async def test_without_an_operator_a_proxy_on_this_machine_serves_nobody_else(self, site: Site):
        token = site.token("org_a")
        headers = {"x-forwarded-for": "198.51.100.1"}
        for site.trusted_proxies in ((), ("127.0.0.1/32",)):
            async with site.client(token) as client:
                assert (await client.get(RUNS, headers=headers)).status_code == 403
                assert (await client.get(RUNS)).status_code == 200


class TestMetrics:
    async def test_those_that_name_orgs_are_for_operators_of_any_role(self, limited: Site):
        limited.top_orgs = 5
        for role, token in TOKENS.items():
            assert await statuses(limited, 1, token, "/metrics") == [403 if role == "starter" else 200]
        assert await statuses(limited, 1, None, "/metrics") == [401]
        assert await statuses(limited, 1, limited.token("org_a"), "/metrics") == [403]
        assert await statuses(limited, 1, "guess", "/metrics") == [401]
        # Health needs none.
        assert await statuses(limited, 1, None, "/livez") == [200]

    async def test_a_session_does_not_open_them(self, limited: Site, page: httpx.AsyncClient):
        limited.top_orgs = 5
        async with limited.client() as client:
            await log_in(client, TOKENS["admin"])
            assert (await client.get("/metrics")).status_code == 401

    async def test_those_that_name_none_are_open(self, limited: Site):
        assert await statuses(limited, 1, None, "/metrics") == [200]

    async def test_guessing_there_is_limited_too(self, limited: Site):
        limited.top_orgs = 5
        seen = []
        for number in range(11):
            seen += await statuses(limited, 1, f"guess-{number}", "/metrics")

        assert seen == [401] * 10 + [429]
