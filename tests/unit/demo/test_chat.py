"""The demo's chat endpoint: its answer is computed from what it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from worker.demo.api import ChatEndpoint

pytestmark = pytest.mark.anyio

ARTICLES = "[kb-1] Passwords\nOpen Settings. Choose Reset.\n\n[kb-2] Plans\nThey change at once. Really."


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Starlette(routes=ChatEndpoint("model-key").routes()))
    headers = {"Authorization": "Bearer model-key"}
    async with httpx.AsyncClient(transport=transport, base_url="http://chat", headers=headers) as client:
        yield client


async def complete(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {
        "model": "gpt-4",
        "max_tokens": 100,
        "messages": [{"role": "system", "content": "Sum up."}, {"role": "user", "content": ARTICLES}],
    }
    return await http.post("/v1/chat/completions", json=body | fields)


async def test_the_answer_sums_up_the_articles_it_is_sent(http):
    answer = (await complete(http, model="gpt-4o")).json()

    assert answer["model"] == "gpt-4o"
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Passwords: Open Settings.\nPlans: They change at once."},
        "finish_reason": "stop",
    }


async def test_a_system_message_that_asks_to_cite_gets_ids(http):
    messages = [
        {"role": "system", "content": "Fold in and cite."},
        {"role": "user", "content": f"So far.\n\n{ARTICLES}"},
    ]

    content = (await complete(http, messages=messages)).json()["choices"][0]["message"]["content"]

    assert content == "So far.\nPasswords: Open Settings. [kb-1]\nPlans: They change at once. [kb-2]"


async def test_max_tokens_cuts_the_answer(http):
    answer = (await complete(http, max_tokens=2)).json()

    assert answer["choices"][0]["message"]["content"] == "Passwords: Open"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


async def test_another_credential_is_refused(http):
    http.headers["Authorization"] = "Bearer an-orgs-token"

    answer = await complete(http)

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": ""}, "invalid_model"),
        ({"max_tokens": "many"}, "invalid_max_tokens"),
        ({"max_tokens": 0}, "invalid_max_tokens"),
        ({"messages": []}, "invalid_messages"),
        ({"messages": [{"role": "user"}]}, "invalid_messages"),
    ],
)
async def test_a_malformed_request_is_refused_by_name(http, fields, code):
    answer = await complete(http, **fields)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
