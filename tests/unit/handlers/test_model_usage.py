"""What an answer of a model says it has cost is found in each form, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from worker.handlers.model_usage import blocking_counting, counting, tokens_of, tokens_of_events
from worker.model.definitions.budgets import MAX_AMOUNT

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
EVENTS = (
    'data: {"choices": [{"delta": {"content": "hi"}}], "usage": null}\n\n'
    'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'
    "data: [DONE]\n\n"
)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"usage": USAGE}, 12),
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 5}}, 12),
        ({"usage": {"input_tokens": 3, "output_tokens": 4}}, 7),
        ({"usage": {"total_tokens": 10**30}}, MAX_AMOUNT),
        ({"usage": {"total_tokens": "12"}}, None),
        ({"usage": {"total_tokens": -1}}, None),
        ({"usage": {"total_tokens": True}}, None),
        ({"usage": None}, None),
        ({}, None),
        ([USAGE], None),
        ("usage", None),
    ],
)
def test_the_usage_of_an_answer(answer, tokens: int | None):
    assert tokens_of(answer) == tokens


def test_the_usage_of_a_streamed_answer_is_in_one_of_its_last_events():
    assert tokens_of_events(EVENTS) == 9
    assert tokens_of_events("data: {\ndata: []\n: comment\n") is None


def answered(content: str | bytes, kind: str = "application/json", status: int = 200) -> httpx.MockTransport:
    headers = {"content-type": kind}
    return httpx.MockTransport(lambda _: httpx.Response(status, headers=headers, content=content))


CASES = [
    (json.dumps({"usage": USAGE}), "application/json; charset=utf-8", 200, [12]),
    (EVENTS, "text/event-stream", 200, [9]),
    (json.dumps({"usage": USAGE}), "application/json", 429, []),
    (json.dumps({"usage": USAGE}), "text/plain", 200, []),
    ("not JSON", "application/json", 200, []),
    ("{}", "application/json", 200, []),
]


@pytest.mark.parametrize(("content", "kind", "status", "tokens"), CASES)
async def test_a_client_counts_each_answer_once(content: str, kind: str, status: int, tokens: list[int]):
    counted: list[int] = []

    async def count(found: int) -> None:
        counted.append(found)

    hooks = {"response": [counting(count)]}
    async with httpx.AsyncClient(event_hooks=hooks, transport=answered(content, kind, status)) as client:
        response = await client.get("https://model.example/")

    assert (response.text, counted) == (content, tokens)


@pytest.mark.parametrize(("content", "kind", "status", "tokens"), CASES)
def test_a_client_that_blocks_does_the_same(content: str, kind: str, status: int, tokens: list[int]):
    counted: list[int] = []
    hooks = {"response": [blocking_counting(counted.append)]}
    with httpx.Client(event_hooks=hooks, transport=answered(content, kind, status)) as client:
        response = client.get("https://model.example/")

    assert (response.text, counted) == (content, tokens)


async def test_a_streamed_answer_arrives_part_by_part():
    counted: list[int] = []

    async def count(found: int) -> None:
        counted.append(found)

    hooks = {"response": [counting(count)]}

    async def parts() -> AsyncIterator[bytes]:
        for line in EVENTS.splitlines(keepends=True):
            yield line.encode()

    headers = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=parts()))
    async with (
        httpx.AsyncClient(event_hooks=hooks, transport=transport) as client,
        client.stream("GET", "https://model.example/") as response,
    ):
        assert counted == []
        lines = [line async for line in response.aiter_lines() if line]

    assert (lines[-1], counted) == ("data: [DONE]", [9])
