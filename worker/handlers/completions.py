"""Model requests as steps: in a batch, for which the run waits without a process, or on their own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from worker.handlers.json_text import NotStorable, to_json_text
from worker.handlers.model_usage import LLM_TOKENS
from worker.handlers.spending import Spending
from worker.handlers.step_calls import BACKOFF, StepCalls, Tries
from worker.handlers.steps import StepError, StepId
from worker.handlers.waits import AnyWaits
from worker.model.batches import (
    BASE_URLS,
    MAX_BODY,
    ModelApi,
    NewRequest,
    Provider,
    path_of,
    usage_of,
    wait_name,
)
from worker.model.prices import ModelUsage
from worker.model.runs.waits import NewWait

STEP = "complete"
# Seconds that a model may take for a request of its own.
MODEL_SECONDS = 600.0
# The variable of a run with a provider's key, if the org has no secret for it.
VARIABLES: Mapping[Provider, str] = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
ANTHROPIC_VERSION = "2023-06-01"
ONCE = Tries(0, float(BACKOFF), None)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request as its provider takes it: `body` is JSON text."""

    api: ModelApi
    path: str
    body: str
    betas: tuple[str, ...] = ()


Encode = Callable[[], Awaitable[Encoded | None]]
Decode = Callable[[Mapping[str, Any]], Any]


@dataclass(eq=False, slots=True)
class Completions:
    """The model requests of an attempt; `batched` if those that have batches go into them."""

    steps: StepCalls
    waits: AnyWaits
    gate: Spending
    batched: bool

    async def complete(self, step: StepId, encoded: Encoded, send: Callable[[], Any], decode: Decode) -> Any:
        """The result of a request of `ctx.complete`."""

        async def encode() -> Encoded:
            return encoded

        return await self.request(step, encode, send, decode, LLM_TOKENS)

    async def request(
        self, step: StepId, encode: Encode, send: Callable[[], Any], decode: Decode, meter: str | None
    ) -> Any:
        """The result of a model request, a step: from its batch, or of `send` if it is to be sent on its own.

        `encode` gives the request, or None if its model has no batches; `decode` makes the result of the step
        from the answer, with `status` and `body`. The worker counts the tokens of an answer.
        """
        text = await self.steps._replayed(step) if self.batched else None
        if text is None and self.batched and (encoded := await encode()) is not None:
            text = await self._batched(step, encoded, decode, meter)
        if text is None:
            return await self.steps._run(step, send, ONCE, self.steps._check(str(step), send, None))
        return json.loads(text)

    async def _batched(self, step: StepId, encoded: Encoded, decode: Decode, meter: str | None) -> str | None:
        """The result as JSON text; None if the request is to be sent on its own. Parks the attempt."""
        if len(encoded.body.encode()) > MAX_BODY:
            return None
        while (stopped := await self.gate.reached()) is not None:
            await self.gate.stop(stopped)
        of_step = step.name, step.key, step.occurrence
        request = NewRequest(*of_step, encoded.api.name, encoded.path, encoded.body, encoded.betas, meter)
        wait = NewWait(wait_name(step.name, step.key or ""), step.occurrence, "batch", request=request)
        state = await self.waits.park(wait)
        if state.state != "answered" or state.answer_json is None:
            return None
        started_at = self.steps._clock.now()
        with self.steps.journal.open(step) as opened:
            try:
                value = decode(json.loads(state.answer_json))
            except Exception as error:
                _log.warning("the result of step %s in a batch is not usable: %s", step, error)
                return None
            return await self.steps._stored(self.steps._new_step(opened, value, started_at))


def body_text(body: Any) -> str:
    """A request of a handler as JSON text. Raises TypeError, StepError."""
    if not isinstance(body, Mapping) or not isinstance(body.get("model"), str):
        raise TypeError(
            "ctx.complete: pass the body of the request as a mapping with its model, such as "
            '{"model": "gpt-5-mini", "input": "…"}'
        )
    if body.get("stream") or body.get("background"):
        raise TypeError("ctx.complete: a request with stream or background has no result to store")
    try:
        return to_json_text(dict(body), "request of ctx.complete", MAX_BODY)
    except NotStorable as error:
        raise StepError(f"{error}; send less, or use ctx.step") from None


def api_of(apis: tuple[ModelApi, ...], via: str | None) -> ModelApi:
    """The API of this NAME; without one the only one, else OpenAI's. Raises TypeError."""
    if via is None and len(apis) == 1:
        return apis[0]
    name = via or "openai"
    for one in apis:
        if one.name == name:
            return one
    if name in BASE_URLS:
        provider: Provider = "anthropic" if name == "anthropic" else "openai"
        return ModelApi(name, provider, BASE_URLS[provider])
    known = ", ".join([one.name for one in apis] or BASE_URLS)
    raise TypeError(f"ctx.complete: via= is the NAME of [batches.NAME]: {known}; not {name!r}")


def encoded_body(api: ModelApi, body: Any) -> Encoded:
    """A request of `ctx.complete`. Raises TypeError, StepError."""
    return Encoded(api, path_of(api.provider, body), body_text(body))


def response_of(api: ModelApi) -> Decode:
    """What makes the response of a model from an answer."""

    def decode(answer: Mapping[str, Any]) -> Any:
        read = json.loads(answer["body"])
        return read["message"] if api.provider == "anthropic" else read

    return decode


def sent(encoded: Encoded, secrets: Mapping[str, str]) -> dict[str, Any]:
    """The arguments with which an httpx client sends a request on its own. Raises TypeError without a key."""
    api = encoded.api
    variable = VARIABLES[api.provider]
    key = secrets.get(api.secret) or os.environ.get(variable)
    if not key:
        secret = api.secret or f"{api.name}_key"
        raise TypeError(
            f"ctx.complete: there is no key for {api.name}: declare @job(secrets={{{secret!r}}}), or pass "
            f"the variable {variable} to runs"
        )
    headers = {"Content-Type": "application/json"}
    if api.provider == "anthropic":
        headers |= {"x-api-key": key, "anthropic-version": ANTHROPIC_VERSION}
    else:
        headers["Authorization"] = f"Bearer {key}"
    url = f"{api.base_url}{encoded.path}"
    return {"url": url, "content": encoded.body.encode(), "headers": headers, "timeout": MODEL_SECONDS}


def read_response(response: httpx.Response) -> Any:
    """The body of a response. Raises httpx.HTTPStatusError."""
    response.raise_for_status()
    return response.json()


def used_by(encoded: Encoded, body: Any) -> ModelUsage | None:
    """What the response of a request that was sent on its own reports; None for nothing."""
    return usage_of(encoded.api.provider, json.loads(encoded.body)["model"], body)
