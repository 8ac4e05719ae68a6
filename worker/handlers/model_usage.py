"""Usage: the tokens that the answer of a model in OpenAI's form says it has cost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx

from worker.model.definitions.budgets import MAX_AMOUNT

LLM_TOKENS = "llm_tokens"
# Bytes of an answer that are looked at; a larger one has no usage of a model.
MAX_BYTES = 16 * 1024 * 1024
# Bytes at the end of a streamed answer, where the usage is.
USAGE_WITHIN = 64 * 1024

Count = Callable[[int], Awaitable[None]]
BlockingCount = Callable[[int], None]


def tokens_of(answer: Any) -> int | None:
    """`usage.total_tokens` of an answer, else its parts added up; None if it has no usage."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    if (total := _number(usage.get("total_tokens"))) is not None:
        return total
    parts = [
        number
        for name in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
        if (number := _number(usage.get(name))) is not None
    ]
    return min(sum(parts), MAX_AMOUNT) if parts else None


def tokens_of_events(text: str) -> int | None:
    """The last usage among the server-sent events of a streamed answer, or None."""
    found = None
    for line in text.splitlines():
        if line.startswith("data:"):
            found = tokens_of(_parsed(line.removeprefix("data:"))) or found
    return found


def _number(value: Any) -> int | None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return min(value, MAX_AMOUNT) if is_number else None


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _kind(response: httpx.Response) -> str:
    """`json`, `events`, or nothing for an answer without usage."""
    if response.is_error or response.is_redirect:
        return ""
    media = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return {"application/json": "json", "text/event-stream": "events"}.get(media, "")


def counting(count: Count) -> Callable[[httpx.Response], Awaitable[None]]:
    """A hook for responses of an async client, which counts what each answer says it has cost."""

    async def hook(response: httpx.Response) -> None:
        kind = _kind(response)
        if kind == "json":
            await response.aread()
        if kind and response.is_closed:
            if (tokens := _tokens_in(response, kind)) is not None:
                await count(tokens)
        elif kind and isinstance(response.stream, httpx.AsyncByteStream):
            response.stream = _Observed(response.stream, count)

    return hook


def blocking_counting(count: BlockingCount) -> Callable[[httpx.Response], None]:
    """The same for a client that blocks."""

    def hook(response: httpx.Response) -> None:
        kind = _kind(response)
        if kind == "json":
            response.read()
        if kind and response.is_closed:
            if (tokens := _tokens_in(response, kind)) is not None:
                count(tokens)
        elif kind and isinstance(response.stream, httpx.SyncByteStream):
            response.stream = _BlockingObserved(response.stream, count)

    return hook


def _tokens_in(response: httpx.Response, kind: str) -> int | None:
    if kind == "events":
        return tokens_of_events(response.text)
    return tokens_of(_parsed(response.content)) if len(response.content) <= MAX_BYTES else None


class _Observed(httpx.AsyncByteStream):
    """A streamed answer that is counted once it has ended."""

    def __init__(self, inner: httpx.AsyncByteStream, count: Count) -> None:
        self._inner = inner
        self._count = count

    async def __aiter__(self) -> AsyncIterator[bytes]:
        end = b""
        async for part in self._inner:
            end = (end + part)[-USAGE_WITHIN:]
            yield part
        if (tokens := tokens_of_events(end.decode("utf-8", "replace"))) is not None:
            await self._count(tokens)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BlockingObserved(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, count: BlockingCount) -> None:
        self._inner = inner
        self._count = count

    def __iter__(self) -> Iterator[bytes]:
        end = b""
        for part in self._inner:
            end = (end + part)[-USAGE_WITHIN:]
            yield part
        if (tokens := tokens_of_events(end.decode("utf-8", "replace"))) is not None:
            self._count(tokens)

    def close(self) -> None:
        self._inner.close()
