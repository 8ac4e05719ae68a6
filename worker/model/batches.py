"""Batches: model requests of many runs that a provider answers later, for half the price. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from worker.ids import OrgId
from worker.model.definitions.budgets import MAX_AMOUNT
from worker.model.prices import Kind, ModelUsage, model_name, token_kinds

Provider = Literal["openai", "anthropic"]

# Where a request may go, and what the body of one has; the first is that of a body with none of these keys.
PATHS: Mapping[Provider, tuple[str, ...]] = {
    "openai": ("/v1/responses", "/v1/chat/completions"),
    "anthropic": ("/v1/messages",),
}
BASE_URLS: Mapping[Provider, str] = {
    "openai": "https://api.openai.com",
    "anthropic": "https://api.anthropic.com",
}
TITLES: Mapping[Provider, str] = {"openai": "OpenAI", "anthropic": "Anthropic"}
# Bytes of the JSON text of a request: a larger one is sent on its own.
MAX_BODY = 1024 * 1024
MAX_BETAS = 20
# Bytes of a batch, within what OpenAI takes as one file.
MAX_BATCH_BYTES = 190 * 1024 * 1024
# Runs of a definition whose turns are known, and batches whose time is.
KNOWN_RUNS = 50
KNOWN_BATCHES = 50
SHARE = 0.9
# How long a request takes that is sent on its own: a run that falls back needs that for each turn left.
SYNC_TURN = timedelta(seconds=60)
# Output tokens that are reserved for a request that names no maximum; bytes of an input token.
RESERVED_OUTPUT = 4096
BYTES_OF_TOKEN = 3
# What a response of OpenAI contains for each call of a tool that is billed.
_OPENAI_CALLS: Mapping[Kind, str] = {
    "web_search": "web_search_call",
    "file_search": "file_search_call",
    "code_execution": "code_interpreter_call",
}
# Why a request is sent on its own.
Fallback = Literal[
    "no_key",
    "no_api",
    "egress",
    "too_large",
    "late",
    "deadline",
    "failed",
    "expired",
    "unreadable",
    "refused",
]


@dataclass(frozen=True, slots=True)
class ModelApi:
    """An API with batches, `[batches.NAME]`. `base_url` has neither `/v1` nor a slash at its end."""

    name: str
    provider: Provider
    base_url: str
    secret: str = ""

    @property
    def origin(self) -> str:
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc}"

    def answers(self, provider: str, base_url: str) -> bool:
        """Whether a client of this provider and URL reaches this API."""
        return provider == self.provider and root_of(base_url) == self.base_url


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request of one step of a run. `api` is the NAME of its API, `meter` counts its tokens."""

    step: str
    key: str | None
    occurrence: int
    api: str
    path: str
    body_json: str
    betas: tuple[str, ...] = ()
    meter: str | None = None


class Pool(NamedTuple):
    """What the requests of a batch share. `account` is the org whose key it is; None: the operator's."""

    api: str
    account: OrgId | None
    path: str
    model: str
    betas: str


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that waits for its batch; `size` is in bytes. `apart`: it shares one with its org only."""

    id: str
    org_id: OrgId
    pool: Pool
    size: int
    opened_at: datetime
    apart: bool = False


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch is submitted, and how much it has."""

    every: timedelta
    max_requests: int
    max_bytes: int


def wait_name(step: str, key: str) -> str:
    """The name of the wait for the request of a step, whose `key` is empty without one."""
    digest = hashlib.sha256("\n".join((step, key)).encode()).hexdigest()
    return f"batch:{digest[:32]}"


def root_of(url: str) -> str:
    """A base URL without the version of the API, which is in the paths."""
    return url.rstrip("/").removesuffix("/v1")


def path_of(provider: Provider, body: Mapping[str, Any]) -> str:
    """Where a body goes that names no path."""
    is_chat = provider == "openai" and "messages" in body and "input" not in body
    return PATHS[provider][1 if is_chat else 0]


def pooled(
    pending: Iterable[PendingRequest], limits: Mapping[str, BatchLimits], now: datetime
) -> list[list[PendingRequest]]:
    """The batches that are due now, each of one pool, by the limits of its API; the others wait.

    A pool is due once its oldest request has waited for `every`, or once it fills a batch. Orgs take turns.
    """
    pools: dict[tuple[Pool, OrgId | None], list[PendingRequest]] = {}
    for one in pending:
        pools.setdefault((one.pool, one.org_id if one.apart else None), []).append(one)
    batches: list[list[PendingRequest]] = []
    for (pool, _), listed in pools.items():
        limit = limits.get(pool.api)
        if limit is None:
            continue
        oldest = min(one.opened_at for one in listed)
        parts = _parts(_in_turns(listed), limit)
        if now < oldest + limit.every:
            # The last one may still grow.
            parts.pop()
        batches += parts
    return batches


def _in_turns(listed: Iterable[PendingRequest]) -> list[PendingRequest]:
    """The requests by age, one of each org after the other."""
    by_org: dict[OrgId, deque[PendingRequest]] = {}
    for one in sorted(listed, key=lambda one: (one.opened_at, one.id)):
        by_org.setdefault(one.org_id, deque()).append(one)
    found: list[PendingRequest] = []
    while by_org:
        for org_id in list(by_org):
            found.append(by_org[org_id].popleft())
            if not by_org[org_id]:
                del by_org[org_id]
    return found


def _parts(listed: Sequence[PendingRequest], limit: BatchLimits) -> list[list[PendingRequest]]:
    parts: list[list[PendingRequest]] = [[]]
    size = 0
    for one in listed:
        if parts[-1] and (len(parts[-1]) >= limit.max_requests or size + one.size > limit.max_bytes):
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += one.size
    return parts


@dataclass(frozen=True, slots=True)
class Experience:
    """The requests of each of a definition's last runs, and how long the last batches took, in seconds."""

    turns: Sequence[int] = ()
    seconds: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a request is sent on its own at the latest; None without a deadline. `late`: at once."""

    fall_back_at: datetime | None
    late: bool


def forecast(now: datetime, until: datetime | None, turns: int, known: Experience) -> Forecast:
    """Whether a run that has made `turns` requests ends by `until` if the next ones go into batches.

    The rest of the run is estimated by the 90th percentiles of what is known. Without it, one turn is left,
    and a batch takes no time.
    """
    if until is None:
        return Forecast(None, late=False)
    left = max(1, math.ceil(percentile(known.turns, SHARE) or 0) - turns)
    seconds = percentile(known.seconds, SHARE) or 0.0
    fall_back_at = until - left * SYNC_TURN
    return Forecast(fall_back_at, late=fall_back_at <= now or now + left * timedelta(seconds=seconds) > until)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that is not below this share of the values; None without any."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def most_usage(provider: Provider, model: str, body: Mapping[str, Any], size: int) -> ModelUsage:
    """The most that a request is expected to use: its input, by its bytes, and its maximum output."""
    most = [body.get(key) for key in ("max_output_tokens", "max_completion_tokens", "max_tokens")]
    output = next((value for value in most if isinstance(value, int) and value > 0), RESERVED_OUTPUT)
    kinds = token_kinds(math.ceil(size / BYTES_OF_TOKEN), min(output, MAX_AMOUNT))
    return _usage(provider, model, {**kinds, "request": 1})


def usage_of(provider: Provider, model: str, response: Any) -> ModelUsage | None:
    """What the response of a model reports that it used; None if it reports nothing.

    `model` is the one that was asked, for a response that names none.
    """
    found = response.get("usage") if isinstance(response, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    kinds = _anthropic_kinds(found) if provider == "anthropic" else _openai_kinds(found, response)
    if not any(kinds.values()):
        return None
    with suppress(ValueError):
        model = model_name(response.get("model"))
    return _usage(provider, model, {**kinds, "request": 1})


def _usage(provider: Provider, model: str, kinds: Mapping[Kind, int]) -> ModelUsage:
    return ModelUsage(provider, model, tuple((kind, units) for kind, units in kinds.items() if units))


def _openai_kinds(usage: Mapping[str, Any], response: Mapping[str, Any]) -> dict[Kind, int]:
    prompt, output = ("prompt", "completion") if "prompt_tokens" in usage else ("input", "output")
    tokens = token_kinds(
        _number(usage, f"{prompt}_tokens"),
        _number(usage, f"{output}_tokens"),
        read=_number(usage.get(f"{prompt}_tokens_details"), "cached_tokens"),
        reasoning=_number(usage.get(f"{output}_tokens_details"), "reasoning_tokens"),
    )
    said = response.get("output")
    parts = said if isinstance(said, list) else ()
    called = Counter(str(one.get("type")) for one in parts if isinstance(one, Mapping))
    return tokens | {kind: called[type_] for kind, type_ in _OPENAI_CALLS.items()}


def _anthropic_kinds(usage: Mapping[str, Any]) -> dict[Kind, int]:
    written, read = (_number(usage, f"cache_{what}_input_tokens") for what in ("creation", "read"))
    tokens = token_kinds(
        _number(usage, "input_tokens") + written + read,
        _number(usage, "output_tokens"),
        read=read,
        written=written,
        hour=_number(usage.get("cache_creation"), "ephemeral_1h_input_tokens"),
    )
    return tokens | {"web_search": _number(usage.get("server_tool_use"), "web_search_requests")}


def _number(found: Any, name: str) -> int:
    value = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return 0
    return min(value, MAX_AMOUNT)


@dataclass(frozen=True, slots=True)
class Result:
    """What a provider made of one request, in the form of pydantic-ai's `BatchResult`.

    `id` is the `custom_id`. `body` is JSON text: OpenAI's body of the response, or Anthropic's `result`.
    """

    id: str
    status: Literal["succeeded", "errored", "expired", "canceled"]
    body: str | None = None

    def answer(self) -> str:
        """The JSON text that the run gets."""
        return json.dumps({"status": self.status, "body": self.body})

    def response(self, provider: Provider) -> Any:
        """The model's response, or None if the request failed."""
        if self.status != "succeeded" or self.body is None:
            return None
        read = json.loads(self.body)
        return read.get("message") if provider == "anthropic" and isinstance(read, dict) else read
