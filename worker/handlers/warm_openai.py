"""Loads what agents of OpenAI need, for `preload`: the libraries import and build much of it at first use.

    preload = ["worker.handlers.warm_openai"]

Without it each attempt of such an agent spends some 200 ms of processor time on that. It needs
`pydantic-ai-slim[openai]`, makes no request and starts no thread.
"""

from __future__ import annotations

import asyncio
import json

import openai.lib.streaming.responses  # noqa: F401
from openai.types.responses import Response
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.batch import BatchRequest, BatchResult
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

import worker.handlers.agents  # noqa: F401

_TEXT = {"type": "output_text", "text": "warm", "annotations": []}
_MESSAGE = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [_TEXT]}
_CALL = {"type": "function_call", "id": "f", "call_id": "c", "name": "tool", "arguments": '{"topic": "warm"}'}
_RESPONSE = {
    **{"id": "r", "object": "response", "created_at": 0, "model": "gpt-5-mini", "status": "completed"},
    **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
    "usage": {
        **{"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    },
}


class _Canned(WrapperModel):
    """Encodes each request, and decodes a canned response: a call of the tool, then a text."""

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        request = BatchRequest(
            custom_id="warm",
            messages=messages,
            model_settings=model_settings,
            model_request_parameters=model_request_parameters,
        )
        await self.wrapped.batch_encode(request)
        body = json.dumps(_RESPONSE | {"output": [_CALL if len(messages) == 1 else _MESSAGE]})
        return self.wrapped.batch_decode(
            BatchResult(custom_id="warm", status="succeeded", body=body), request
        )


def _warm() -> None:
    """Run an agent with a tool, which builds what agents need."""
    Response.model_rebuild(force=True)
    agent = Agent(_Canned(OpenAIResponsesModel("gpt-5-mini", provider=OpenAIProvider(api_key="none"))))

    @agent.tool_plain
    async def tool(topic: str) -> str:
        return topic

    asyncio.run(agent.run("warm"))


_warm()
