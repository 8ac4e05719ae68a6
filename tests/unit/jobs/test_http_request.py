"""`http.request`: what it sends, and what each answer makes of the run."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from jobs.http_request import MAX_BODY, Params, UnexpectedAnswer, http_request
from tests.fakes.context import Answer, FakeContext
from worker import PermanentError, Retry


async def call(answer: Answer, **params: Any) -> Any:
    params.setdefault("url", "https://api.example/orgs/{org_code}/tick")
    return await http_request(FakeContext(answer, Params(**params)))


def answering(status: int, **kwargs: Any) -> Answer:
    return lambda request: httpx.Response(status, **kwargs)


async def test_the_url_is_the_orgs_own_and_the_body_is_json():
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"ok": True})

    result = await call(
        answer,
        url="https://api.example/orgs/{org_code}?at={scheduled_for}",
        method="POST",
        body={"n": 1},
        headers={"X-Kind": "cron"},
    )

    assert result == {"status": 200, "body": {"ok": True}}
    [request] = seen
    assert request.url.path == "/orgs/org_acme"
    assert request.url.params["at"] == "2030-01-01T03:00:00+00:00"
    assert json.loads(request.content) == {"n": 1}
    assert request.headers["x-kind"] == "cron"


async def test_a_request_without_a_body_sends_none():
    result = await call(lambda request: httpx.Response(200, text=str(len(request.content))))

    assert result == {"status": 200, "body": "0"}


async def test_an_empty_answer_and_text_are_results():
    assert await call(answering(204)) == {"status": 204, "body": None}
    assert await call(answering(200, text="fine")) == {"status": 200, "body": "fine"}


async def test_an_answer_that_only_says_it_is_json_stays_text():
    answer = answering(200, content=b"{", headers={"content-type": "application/json"})

    assert await call(answer) == {"status": 200, "body": "{"}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(status):
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(status, headers={"Location": "https://elsewhere.example/"})

    with pytest.raises(UnexpectedAnswer, match=str(status)):
        await call(answer)
    assert len(seen) == 1


async def test_a_long_body_is_cut():
    result = await call(answering(200, text="x" * (MAX_BODY + 10)))

    assert len(result["body"]) == MAX_BODY


async def test_an_expected_status_is_success_and_another_2xx_then_is_not():
    assert (await call(answering(404), expect=[404]))["status"] == 404
    with pytest.raises(UnexpectedAnswer, match="200"):
        await call(answering(200), expect=[404])


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_asks_to_wait_is_asked_again_then(status):
    outcome = await call(answering(status, headers={"Retry-After": "7"}))

    assert isinstance(outcome, Retry)
    assert outcome.after == timedelta(seconds=7)


async def test_a_4xx_is_not_tried_again():
    with pytest.raises(PermanentError, match="403"):
        await call(answering(403))


@pytest.mark.parametrize("status", [408, 429, 500, 502])
async def test_what_may_pass_is_tried_again(status):
    with pytest.raises(UnexpectedAnswer, match=str(status)):
        await call(answering(status))


@pytest.mark.parametrize("name", ["Authorization", "cookie", "Proxy-Authorization"])
def test_a_secret_has_no_place_in_params(name):
    with pytest.raises(ValidationError, match="sent automatically"):
        Params(url="https://api.example", headers={name: "x"})


@pytest.mark.parametrize("url", ["ftp://api.example", "api.example", "file:///etc/passwd"])
def test_only_http_urls_are_taken(url):
    with pytest.raises(ValidationError, match="pattern"):
        Params(url=url)


@pytest.mark.parametrize("url", ["http://0177.0.0.1/", "http:///path", "http://[::1/"])
async def test_what_cannot_be_read_as_a_url_is_not_tried_again(url):
    with pytest.raises(PermanentError, match="is not a URL"):
        await call(answering(200), url=url)


def test_an_unknown_param_is_named():
    with pytest.raises(ValidationError, match="metod"):
        Params.model_validate({"url": "https://api.example", "metod": "GET"})
