"""`assistant.digest`: pages, checkpoints, two agents, and two credentials that never mix."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from jobs import assistant_digest
from jobs.assistant_digest import Params, Settings, digest, digest_v2
from tests.fakes.context import FakeContext
from worker import PermanentError, Retry

pytestmark = pytest.mark.anyio

# An org may choose the collection where its definition says so; the rest of the path is not its choice.
OUTSIDE = ["..", ".", "", "../../admin", "a/b", "a%2fb", "faq?x=1", "faq#", "faq\n", "a b", "é"]

PARAMS = Params(knowledge_base="https://kb.example", chat="https://chat.example", page_size=2)
SETTINGS = Settings(model_version="gpt-4o", max_tokens=50)
ARTICLES = [{"id": f"kb-{n}", "title": f"Title {n}", "text": f"Text {n}."} for n in range(1, 6)]


def knowledge_base(request: httpx.Request) -> httpx.Response:
    assert request.url.path == "/v1/collections/faq/articles"
    after, limit = int(request.url.params["after"]), int(request.url.params["limit"])
    end = after + limit
    return httpx.Response(
        200, json={"articles": ARTICLES[after:end], "next": end if end < len(ARTICLES) else None}
    )


class Model:
    """A chat endpoint that answers with the count of its requests, and remembers them."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.status = 200

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        content = f"answer {len(self.requests)}"
        return httpx.Response(
            self.status,
            headers={"Retry-After": "9"},
            json={"choices": [{"message": {"role": "assistant", "content": content}}]},
        )

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setenv("ASSISTANT_API_KEY", "model-key")

    def with_mock(**kwargs: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(model.answer), **kwargs)

    monkeypatch.setattr(assistant_digest, "httpx", SimpleNamespace(AsyncClient=with_mock))
    return model


def context(answer: Callable[[httpx.Request], httpx.Response] = knowledge_base, **kwargs: Any) -> FakeContext:
    return FakeContext(answer, PARAMS, SETTINGS, **kwargs)


async def test_every_page_is_read_once_and_saved(model):
    ctx = context()

    result = await digest(ctx)

    assert result == {
        "agent": "v1",
        "model": "gpt-4o",
        "articles": 5,
        "digest": "answer 1\n\nanswer 2\n\nanswer 3",
    }
    assert [saved["next"] for saved in ctx.saved] == [2, 4, None]
    assert ctx.progressed == [2, 4, 5]


async def test_another_attempt_goes_on_behind_the_checkpoint(model):
    ctx = context(checkpoint={"next": 4, "articles": 4, "digest": "so far"})

    result = await digest(ctx)

    assert len(model.requests) == 1
    assert "[kb-5]" in model.bodies[0]["messages"][1]["content"]
    assert (result["articles"], result["digest"]) == (5, "so far\n\nanswer 1")


async def test_a_checkpoint_behind_the_last_page_is_the_result(model):
    result = await digest(context(checkpoint={"next": None, "articles": 5, "digest": "all"}))

    assert (result["digest"], model.requests) == ("all", [])


async def test_agent_v2_folds_each_page_into_the_digest(model):
    result = await digest_v2(context())

    assert (result["agent"], result["digest"]) == ("v2", "answer 3")
    assert model.bodies[2]["messages"][1]["content"].startswith("answer 2\n\n[kb-5]")


async def test_the_model_is_asked_as_the_orgs_properties_say(model):
    await digest(context())

    assert {(body["model"], body["max_tokens"]) for body in model.bodies} == {("gpt-4o", 50)}


async def test_the_model_gets_its_own_credential(model):
    await digest(context())

    assert {request.headers["authorization"] for request in model.requests} == {"Bearer model-key"}


async def test_without_its_credential_the_run_is_not_tried_again(model, monkeypatch):
    monkeypatch.delenv("ASSISTANT_API_KEY")

    with pytest.raises(PermanentError, match="pass_environment"):
        await digest(context())


async def test_a_busy_model_is_asked_again_later(model):
    model.status = 429

    outcome = await digest(context())

    assert isinstance(outcome, Retry)
    assert outcome.after == timedelta(seconds=9)


async def test_a_refused_credential_of_the_model_is_not_tried_again(model):
    model.status = 401

    with pytest.raises(PermanentError, match="401"):
        await digest(context())


async def test_a_failing_model_is_tried_again(model):
    model.status = 500

    with pytest.raises(httpx.HTTPStatusError):
        await digest(context())


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_knowledge_base_that_refuses_is_not_asked_again(model, status):
    with pytest.raises(PermanentError, match=f"{status} to org_acme"):
        await digest(context(lambda request: httpx.Response(status)))


async def test_a_failing_knowledge_base_is_tried_again(model):
    with pytest.raises(httpx.HTTPStatusError):
        await digest(context(lambda request: httpx.Response(502)))


def test_a_number_as_text_is_a_setting():
    assert Settings.model_validate({"max_tokens": "1000"}).max_tokens == 1000


@pytest.mark.parametrize("collection", OUTSIDE)
def test_a_collection_is_one_segment_of_the_path(collection):
    with pytest.raises(ValidationError, match="collection"):
        Params(knowledge_base="https://kb.example", chat="https://chat.example", collection=collection)
