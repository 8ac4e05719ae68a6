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
from pydantic_ai.messages import ModelMessage, ModelRequest
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.batch import BatchRequest, BatchResult
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

import worker.handlers.agents  # noqa: F401

_TEXT = {"type": "output_text", "text": "warm", "annotations": []}
_MESSAGE = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [_TEXT]}
_CALL = {"type": "function_call", "id": "f", "call_id": "c", "name": "t", "arguments": "{}"}
_RESPONSE = {
    **{"id": "r", "object": "response", "created_at": 0, "model": "warm", "status": "completed"},
    **{"output": [_CALL, _MESSAGE], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
    "usage": {
        **{"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    },
}


async def _warm() -> None:
    """Encode a request and decode a response, which builds what both need."""
    Response.model_rebuild(force=True)
    model = OpenAIResponsesModel("warm", provider=OpenAIProvider(api_key="none"))
    Agent(model)
    messages: list[ModelMessage] = [ModelRequest.user_text_prompt("warm")]
    tools = [ToolDefinition(name="t", parameters_json_schema={"type": "object", "properties": {}})]
    request = BatchRequest(
        custom_id="warm",
        messages=messages,
        model_settings=None,
        model_request_parameters=ModelRequestParameters(function_tools=tools),
    )
    result = BatchResult(custom_id="warm", status="succeeded", body=json.dumps(_RESPONSE))
    # An answer, then the request with it in its history.
    for _ in range(2):
        await model.batch_encode(request)
        messages.append(model.batch_decode(result, request))


asyncio.run(_warm())
