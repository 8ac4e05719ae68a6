"""The demo's customer API: the org is the token's, and so are the articles."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.fakes.clock import ManualClock
from worker.demo.api import CustomerApi
from worker.demo.provider import Application, Fault, Provider
from worker.guard import Guard

URL = "http://127.0.0.1:9000"
AUDIENCE = "https://api.example"


@pytest.fixture
def provider(clock: ManualClock) -> Provider:
    def application(org: str, *scopes: str) -> Application:
        return Application(f"org_{org}", org, "secret", scopes=scopes, audiences=(AUDIENCE,))

    apps = [application("acme", "read:kb"), application("other", "write:kb")]
    return Provider(URL, apps, clock=clock)


@pytest.fixture
async def issuer(provider: Provider) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(provider.asgi()), base_url=URL) as client:
        yield client


@pytest.fixture
async def http(issuer: httpx.AsyncClient, clock: ManualClock) -> AsyncIterator[httpx.AsyncClient]:
    guard = Guard(URL, audience=AUDIENCE, scopes={"read:kb"}, client=issuer, clock=clock)
    api = CustomerApi(guard, orgs={"org_acme": "Acme"}, chat_key="model-key")
    transport = httpx.ASGITransport(api.asgi())
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client
    await guard.close()


async def list_articles(
    http: httpx.AsyncClient, issuer: httpx.AsyncClient, client_id: str = "acme", **query: Any
) -> httpx.Response:
    form = {"grant_type": "client_credentials", "client_secret": "secret", "audience": AUDIENCE}
    answer = await issuer.post("/oauth2/token", data=form | {"client_id": client_id})
    headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}
    return await http.get("/v1/collections/faq/articles", params=query, headers=headers)


async def test_an_org_reads_its_own_articles_page_by_page(http, issuer):
    seen, after = [], 0
    while after is not None:
        page = (await list_articles(http, issuer, after=after, limit=3)).json()
        assert page["org"] == "org_acme"
        seen += [article["id"] for article in page["articles"]]
        after = page["next"]

    assert seen == [f"kb-{number}" for number in range(1, 8)]


async def test_without_a_token_there_is_nothing(http):
    assert (await http.get("/v1/collections/faq/articles")).status_code == 401


async def test_a_token_without_the_scope_may_not_read(http, issuer):
    assert (await list_articles(http, issuer, "other")).status_code == 403


async def test_a_forged_token_is_turned_away(http, issuer, provider):
    provider.misbehave(Fault(forged=True))

    assert (await list_articles(http, issuer)).status_code == 401


async def test_an_org_without_a_knowledge_base_finds_nothing(http, issuer, provider):
    provider.misbehave(Fault(replace={"org_code": "org_nobody"}))

    assert (await list_articles(http, issuer)).status_code == 404


async def test_an_orgs_token_does_not_open_the_chat(http, issuer):
    form = {"grant_type": "client_credentials", "client_secret": "secret", "audience": AUDIENCE}
    token = (await issuer.post("/oauth2/token", data=form | {"client_id": "acme"})).json()["access_token"]

    answer = await http.post("/v1/chat/completions", json={}, headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 401
