"""The built-in handlers against the demo's customer API, which verifies each token by `worker.guard`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes.site import AUDIENCE, Site, application, definition
from worker.demo.api import CustomerApi
from worker.demo.provider import Fault, Provider
from worker.demo.serving import ServerThread, bind_loopback
from worker.guard import Guard

CHAT_KEY = "key-of-the-model"


@dataclass(frozen=True)
class Api:
    """The customer API, served."""

    inside: CustomerApi
    url: str

    @property
    def articles(self) -> str:
        return f"{self.url}/v1/collections/faq/articles"


@pytest.fixture
def api(provider: Provider) -> Iterator[Api]:
    guard = Guard(provider.url, audience=AUDIENCE, scopes={"read:kb"})
    inside = CustomerApi(guard, orgs={"org_acme": "Acme"}, chat_key=CHAT_KEY)
    with ServerThread(inside.asgi(), bind_loopback()) as thread:
        yield Api(inside, thread.url)


@pytest.fixture
def ready(site: Site, api: Api) -> Site:
    """An installation whose tokens are for the API."""
    site.configure(
        execution='pass_environment = ["ASSISTANT_API_KEY"]', issuer=f'api_origins = ["{api.url}"]'
    )
    site.environment["ASSISTANT_API_KEY"] = CHAT_KEY
    properties = {"model_version": "gpt-4o", "max_tokens": 12}
    site.add_orgs(application("org_acme", properties=properties, flags={"agent-v2": True}))
    return site


def test_http_request_calls_the_api_with_the_orgs_token(ready, api):
    params = {"url": f"{api.articles}?limit=1&from={{org_code}}"}
    ready.apply(definition("org_acme", "call", "http.request", scopes=["read:kb"], params=params))
    ready.start_worker()
    ready.cli("definitions", "run", "org_acme", "call")

    run = ready.wait_for_end(definition="call")

    assert run["state"] == "succeeded", run["error"]
    assert run["result"]["status"] == 200
    assert run["result"]["body"]["org"] == "org_acme"


def test_http_request_reaches_a_private_address_only_where_its_origin_is_listed(site, api):
    site.configure(execution=f'private_origins = ["{api.url}"]')
    site.add_orgs(application("org_acme"))
    other_name = api.articles.replace("127.0.0.1", "localhost")
    site.apply(
        definition("org_acme", "listed", "http.request", params={"url": api.articles})
        + definition("org_acme", "other", "http.request", params={"url": other_name})
    )
    site.start_worker()
    site.cli("definitions", "run", "org_acme", "listed")
    site.cli("definitions", "run", "org_acme", "other")

    reached, refused = site.wait_for_end(definition="listed"), site.wait_for_end(definition="other")

    # It is reached, and without the token: that goes to api_origins only.
    assert reached["error"]["message"].endswith("returned 401")
    assert (refused["state"], refused["attempt"]) == ("failed", 1)
    assert "localhost has a loopback address" in refused["error"]["message"]


def test_the_digest_reads_every_page_as_the_orgs_properties_say(ready, api):
    params = {"knowledge_base": api.url, "chat": api.url, "page_size": 3}
    variants = [{"flag": "agent-v2", "handler": "assistant.digest_v2"}]
    ready.apply(definition("org_acme", "digest", "assistant.digest", variants=variants, params=params))
    ready.start_worker()
    ready.cli("definitions", "run", "org_acme", "digest")

    run = ready.wait_for_end(definition="digest")

    assert run["state"] == "succeeded", run["error"]
    assert (run["result"]["agent"], run["result"]["articles"]) == ("v2", 7)
    assert len(run["result"]["digest"].split(" ")) <= 12
    assert run["progress"]["done"] == 7
    assert api.inside.chat.models == {"gpt-4o": 3}
    assert (api.inside.reads["org_acme"], api.inside.chat.refused) == (3, 0)
    [attempt] = ready.attempts(run["id"])
    assert attempt["handler"] == "assistant.digest_v2"


def test_a_run_that_outlives_its_tokens_makes_no_failed_call(ready, api, provider):
    provider.misbehave(Fault(lifetime=4), "m2m-org_acme")
    asked = provider.token_requests["m2m-org_acme"]
    params = {"url": api.articles, "seconds": 10}
    ready.apply(definition("org_acme", "poll", "acme.poll", params=params))
    ready.start_worker()
    ready.cli("definitions", "run", "org_acme", "poll")

    run = ready.wait_for_end(definition="poll", timeout=30)

    provider.misbehave(None, "m2m-org_acme")
    assert (run["state"], run["result"]) == ("succeeded", []), run["error"]
    assert 2 <= provider.token_requests["m2m-org_acme"] - asked <= 12
