"""The demo's chat endpoint: its answer is computed from what it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from worker.demo.api import ChatEndpoint

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


async def test_another_credential_is_refused(http):
    http.headers["Authorization"] = "Bearer an-orgs-token"

    answer = await complete(http)

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
