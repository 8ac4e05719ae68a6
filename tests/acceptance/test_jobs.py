"""The built-in handlers against the demo's customer API, which verifies each token by `worker.guard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


@pytest.fixture(scope="module")
def apis(provider: Provider) -> Iterator[tuple[Api, Api]]:
    """One for the tokens of the orgs, and one at a private address that gets none."""
    guard = Guard(provider.url, audience=AUDIENCE, scopes={"read:kb"})
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            inside = CustomerApi(guard, orgs={"org_acme": "Acme", "org_brief": "Brief"}, chat_key=CHAT_KEY)
            made.append(Api(inside, stack.enter_context(ServerThread(inside.asgi(), bind_loopback())).url))
        yield made[0], made[1]


@pytest.fixture
def api(apis: tuple[Api, Api]) -> Api:
    return apis[0]


@pytest.fixture(scope="module")
def ready(shared_site: Callable[..., Site], apis: tuple[Api, Api]) -> Site:
    """An installation whose worker is up."""
    api, private = apis
    site = shared_site(
        f'pass_environment = ["ASSISTANT_API_KEY"]\nprivate_origins = ["{private.url}"]',
        issuer=f'api_origins = ["{api.url}"]',
    )
    site.environment["ASSISTANT_API_KEY"] = CHAT_KEY
    properties = {"model_version": "gpt-4o", "max_tokens": 12}
    site.add_orgs(
        application("org_acme", properties=properties, flags={"agent-v2": True}), application("org_brief")
    )
    site.start_worker()
    return site


def test_http_request_calls_the_api_with_the_orgs_token(ready, api):
    params = {"url": f"{api.articles}?limit=1&from={{org_code}}"}
    ready.apply(definition("org_acme", "call", "http.request", scopes=["read:kb"], params=params))
    ready.cli("definitions", "run", "org_acme", "call")

    run = ready.wait_for_end(definition="call")

    assert run["state"] == "succeeded", run["error"]
    assert run["result"]["status"] == 200
    assert run["result"]["body"]["org"] == "org_acme"


def test_http_request_reaches_a_private_address_only_where_its_origin_is_listed(ready, apis):
    private = apis[1].articles
    other_name = private.replace("127.0.0.1", "localhost")
    ready.apply(
        definition("org_acme", "listed", "http.request", params={"url": private})
        + definition("org_acme", "other", "http.request", params={"url": other_name})
    )
    ready.cli("definitions", "run", "org_acme", "listed")
    ready.cli("definitions", "run", "org_acme", "other")

    reached, refused = ready.wait_for_end(definition="listed"), ready.wait_for_end(definition="other")

    # It is reached, and without the token: that goes to api_origins only.
    assert reached["error"]["message"].endswith("returned 401")
    assert (refused["state"], refused["attempt"]) == ("failed", 1)
    assert "localhost has a loopback address" in refused["error"]["message"]


def test_the_digest_reads_every_page_as_the_orgs_properties_say(ready, api):
    params = {"knowledge_base": api.url, "chat": api.url, "page_size": 3}
    variants = [{"flag": "agent-v2", "handler": "assistant.digest_v2"}]
    ready.apply(definition("org_acme", "digest", "assistant.digest", variants=variants, params=params))
    read = api.inside.reads["org_acme"]
    ready.cli("definitions", "run", "org_acme", "digest")

    run = ready.wait_for_end(definition="digest")

    assert run["state"] == "succeeded", run["error"]
    assert (run["result"]["agent"], run["result"]["articles"]) == ("v2", 7)
    assert len(run["result"]["digest"].split(" ")) <= 12
    assert run["progress"]["done"] == 7
    assert api.inside.chat.models == {"gpt-4o": 3}
    assert (api.inside.reads["org_acme"] - read, api.inside.chat.refused) == (3, 0)
    [attempt] = ready.attempts(run["id"])
    assert attempt["handler"] == "assistant.digest_v2"


def test_a_run_that_outlives_its_tokens_makes_no_failed_call(ready, api, provider):
    provider.misbehave(Fault(lifetime=4), "m2m-org_brief")
    asked = provider.token_requests["m2m-org_brief"]
    params = {"url": api.articles, "seconds": 10}
    ready.apply(definition("org_brief", "poll", "acme.poll", params=params))
    ready.cli("definitions", "run", "org_brief", "poll")

    run = ready.wait_for_end(definition="poll", timeout=30)

    provider.misbehave(None, "m2m-org_brief")
    assert (run["state"], run["result"]) == ("succeeded", []), run["error"]
    assert 2 <= provider.token_requests["m2m-org_brief"] - asked <= 12
