"""`assistant.digest`: each page paid once, two agents, and two credentials that never mix."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from jobs.assistant_digest import Params, Settings, digest, digest_v2
from worker.handlers.job import Job
from worker.testing import Finished, Orgworker

# An org may choose the collection where its definition says so; the rest of the path is not its choice.
OUTSIDE = ["..", ".", "", "../../admin", "a/b", "a%2fb", "faq?x=1", "faq#", "faq\n", "a b", "é"]

KB, CHAT = "https://kb.example", httpx.URL("https://chat.example")
PARAMS = {"knowledge_base": KB, "chat": str(CHAT), "page_size": 2}
PROPERTIES = {"model_version": "gpt-4o", "max_tokens": "50"}
ARTICLES = [{"id": f"kb-{n}", "title": f"Title {n}", "text": f"Text {n}."} for n in range(1, 6)]


def knowledge_base(request: httpx.Request) -> httpx.Response:
    assert request.url.path == "/v1/collections/faq/articles"
    after, limit = int(request.url.params["after"]), int(request.url.params["limit"])
    end = after + limit
    return httpx.Response(
        200, json={"articles": ARTICLES[after:end], "next": end if end < len(ARTICLES) else None}
    )


class Model:
    """A chat endpoint that answers with the count of its requests, and remembers them.

    `fails` has the status of the requests that do not succeed, by their number.
    """

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.fails: dict[int, int] = {}

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        number = len(self.requests)
        return httpx.Response(
            self.fails.get(number, 200),
            headers={"Retry-After": "9"},
            json={
                "choices": [{"message": {"role": "assistant", "content": f"answer {number}"}}],
                "usage": {"total_tokens": 10 * number},
            },
        )

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("ASSISTANT_API_KEY", "model-key")
    return Model()


Run = Callable[..., Finished]
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def run(model: Model, orgworker: Orgworker) -> Run:
    """Runs the digest of a fake org; `model` answers what is sent to the chat endpoint, `api` the rest."""

    def run(handler: Job = digest, *, api: Answer = knowledge_base, **options: Any) -> Finished:
        def answer(request: httpx.Request) -> httpx.Response:
            return model.answer(request) if request.url.host == CHAT.host else api(request)

        given = {"params": PARAMS, "properties": PROPERTIES, "api": answer, "api_origins": [KB]}
        return orgworker.run(handler, org="org_acme", **(given | options))

    return run


def of_the_org(finished: Finished) -> list[httpx.Request]:
    """The requests to the org's own services."""
    return [request for request in finished.requests if request.url.host != CHAT.host]


def test_every_page_is_read_once(run: Run):
    finished = run()

    assert finished.result == {
        "agent": "v1",
        "model": "gpt-4o",
        "articles": 5,
        "digest": "answer 1\n\nanswer 2\n\nanswer 3",
        "published": True,
    }
    assert [request.url.params["after"] for request in of_the_org(finished)] == ["0", "2", "4"]
    assert finished.progress == {"done": 5, "total": None, "note": None}


@pytest.mark.parametrize(
    ("handler", "text"), [(digest, "answer 1\n\nanswer 2\n\nanswer 4"), (digest_v2, "answer 4")]
)
def test_another_attempt_pays_for_no_page_again(run: Run, model: Model, handler: Job, text: str):
    model.fails = {3: 500}

    finished = run(handler)

    assert [attempt.outcome for attempt in finished.attempts] == ["failed", "succeeded"]
    assert finished.result["digest"] == text
    asked = [body["messages"][1]["content"].count("[kb-") for body in model.bodies]
    assert asked == [2, 2, 1, 1]


def test_the_next_run_reads_only_new_articles(run: Run, model: Model):
    first = run()
    assert first.definition_state == {"faq": 5}

    second = run(state=first.definition_state)

    assert (second.result["articles"], second.result["digest"], second.definition_state) == (
        0,
        "",
        {"faq": 5},
    )
    assert len(model.requests) == 3

    ARTICLES.append({"id": "kb-6", "title": "Title 6", "text": "Text 6."})
    try:
        third = run(state=second.definition_state)
    finally:
        ARTICLES.pop()
    assert (third.result["articles"], third.definition_state) == (1, {"faq": 6})
    assert "[kb-6]" in model.bodies[3]["messages"][1]["content"]


def test_what_the_model_used_is_spent_once(run: Run, model: Model):
    model.fails = {3: 500}

    finished = run()

    assert len(finished.attempts) == 2
    assert finished.spends == {"llm_tokens": 10 + 20 + 40}


def test_a_budget_stops_the_digest(run: Run, model: Model):
    finished = run(budgets={"llm_tokens": 15})

    assert (finished.state, finished.spends, len(model.requests)) == ("failed", {"llm_tokens": 30}, 2)


def posting(request: httpx.Request) -> httpx.Response:
    return httpx.Response(201) if request.method == "POST" else knowledge_base(request)


def test_a_digest_is_posted_once_with_the_orgs_token(run: Run):
    finished = run(api=posting, params=PARAMS | {"publish": f"{KB}/digests"})

    [post] = [request for request in of_the_org(finished) if request.method == "POST"]
    assert json.loads(post.content) == {"digest": finished.result["digest"]}
    assert post.headers["authorization"] == of_the_org(finished)[0].headers["authorization"]


@pytest.mark.parametrize("status", [403, 404])
def test_a_refused_digest_is_not_posted_again(run: Run, status: int):
    def refusing(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status) if request.method == "POST" else knowledge_base(request)

    finished = run(api=refusing, params=PARAMS | {"publish": f"{KB}/digests"})

    assert (finished.state, len(finished.attempts)) == ("failed", 1)


@pytest.mark.parametrize(("answer", "posts"), [(True, 1), (False, 0), ({"why": "too long"}, 0)])
def test_an_org_may_review_a_digest_before_it_is_published(run: Run, model: Model, answer: Any, posts: int):
    finished = run(
        api=posting,
        params=PARAMS | {"publish": f"{KB}/digests"},
        flags={"review-before-publish": True},
        answers={"publish": answer},
    )

    assert [attempt.outcome for attempt in finished.attempts] == ["parked", "succeeded"]
    assert finished.result["published"] is (posts == 1)
    assert [request.method for request in of_the_org(finished)].count("POST") == posts
    assert len(model.requests) == 3


def test_a_digest_without_review_in_time_is_not_published(run: Run, orgworker: Orgworker):
    began = orgworker.clock.now()

    finished = run(flags={"review-before-publish": True})

    assert orgworker.clock.now() - began >= timedelta(days=7)
    assert (finished.state, finished.result["published"]) == ("succeeded", False)


def test_nothing_new_asks_for_no_review(run: Run):
    finished = run(flags={"review-before-publish": True}, state={"faq": 5})

    assert (finished.state, len(finished.attempts)) == ("succeeded", 1)


def test_a_collection_has_a_cursor_of_its_own(run: Run):
    finished = run(state={"handbook": 40})

    assert finished.definition_state == {"handbook": 40, "faq": 5}


def test_a_knowledge_base_without_articles_costs_nothing(run: Run, model: Model):
    finished = run(api=lambda request: httpx.Response(200, json={"articles": [], "next": None}))

    assert (finished.result["articles"], finished.result["digest"], model.requests) == (0, "", [])


def test_agent_v2_folds_each_page_into_the_digest(run: Run, model: Model):
    finished = run(digest_v2)

    assert (finished.result["agent"], finished.result["digest"]) == ("v2", "answer 3")
    assert model.bodies[2]["messages"][1]["content"].startswith("answer 2\n\n[kb-5]")


def test_the_model_is_asked_as_the_orgs_properties_say(run: Run, model: Model):
    run()

    assert {(body["model"], body["max_tokens"]) for body in model.bodies} == {("gpt-4o", 50)}


@pytest.mark.parametrize("api_origins", [[KB], [KB, str(CHAT)]])
def test_the_model_gets_its_own_credential_and_never_the_orgs_token(
    run: Run, model: Model, api_origins: list[str]
):
    """Also if its origin is one of the API's. The knowledge base, the control, gets the token only."""
    finished = run(api_origins=api_origins)

    tokens = {request.headers["authorization"] for request in of_the_org(finished)}
    assert {request.headers["authorization"] for request in model.requests} == {"Bearer model-key"}
    assert [token.startswith("Bearer made-up.") for token in tokens] == [True]
    [token] = tokens
    sent = [repr((request.url, request.headers.raw, request.content)) for request in model.requests]
    assert not [text for text in sent if token.removeprefix("Bearer ") in text]


def test_without_its_credential_the_run_is_not_tried_again(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ASSISTANT_API_KEY")

    finished = run()

    assert (finished.state, len(finished.attempts)) == ("failed", 1)
    assert "bind_environment" in (finished.error or {})["message"]


def test_a_busy_model_is_asked_again_later(run: Run, model: Model):
    model.fails = {1: 429}

    finished = run()

    first, second = finished.attempts
    assert second.started_at - first.ended_at >= timedelta(seconds=9)
    assert finished.state == "succeeded"


@pytest.mark.parametrize("status", [400, 401])
def test_a_model_that_refuses_is_not_asked_again(run: Run, model: Model, status: int):
    model.fails = {1: status}

    finished = run()

    assert (finished.state, len(finished.attempts)) == ("failed", 1)
    assert str(status) in (finished.error or {})["message"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_knowledge_base_that_refuses_is_not_asked_again(run: Run, status: int):
    finished = run(api=lambda request: httpx.Response(status))

    assert (finished.state, len(finished.attempts)) == ("failed", 1)
    assert f"{status} to org_acme" in (finished.error or {})["message"]


def test_a_failing_knowledge_base_is_tried_again(run: Run):
    finished = run(api=lambda request: httpx.Response(502))

    assert len(finished.attempts) == 4


def test_a_number_as_text_is_a_setting():
    assert Settings.model_validate({"max_tokens": "1000"}).max_tokens == 1000


@pytest.mark.parametrize("collection", OUTSIDE)
def test_a_collection_is_one_segment_of_the_path(collection):
    with pytest.raises(ValidationError, match="collection"):
        Params(knowledge_base="https://kb.example", chat="https://chat.example", collection=collection)
