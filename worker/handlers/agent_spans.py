"""Agent spans: what the model requests and tool calls of a pydantic-ai agent say for their spans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse
from pydantic_ai.models import Model
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.settings import ModelSettings

from worker.handlers.span_parts import TEXTS_LIMIT
from worker.handlers.steps import StepNotes
from worker.telemetry import genai

# Characters of the messages of a request; of a longer conversation these are the newest.
_MESSAGES = TEXTS_LIMIT // 4


def note_request(
    notes: StepNotes, agent: str, model: Model, messages: Sequence[ModelMessage], given: ModelSettings | None
) -> None:
    """Say what a model is asked, before it is."""
    settings: Mapping[str, Any] = {**(model.settings or {}), **(given or {})}
    notes.about = _present(
        {
            genai.OPERATION: genai.CHAT,
            genai.PROVIDER: _provider(model.system),
            genai.REQUEST_MODEL: model.model_name,
            genai.AGENT: agent,
            genai.MAX_TOKENS: settings.get("max_tokens"),
            genai.TEMPERATURE: settings.get("temperature"),
            genai.TOP_P: settings.get("top_p"),
        }
    )
    if notes.texts is not None:
        notes.texts[genai.INPUT] = _newest(messages)
        instructions = [message.instructions for message in messages if isinstance(message, ModelRequest)]
        if instructions and instructions[-1]:
            notes.texts[genai.INSTRUCTIONS] = _text([{"type": "text", "content": instructions[-1]}])


def note_response(notes: StepNotes, response: ModelResponse) -> None:
    """Say what a model has answered. Cached tokens are part of the input, reasoning is part of the output."""
    usage = response.usage
    notes.about |= _present(
        {
            # A fallback's own name is that of all its models.
            genai.PROVIDER: _provider(response.provider_name) if response.provider_name else None,
            genai.RESPONSE_MODEL: response.model_name,
            genai.RESPONSE_ID: response.provider_response_id,
            genai.FINISH_REASONS: None if response.finish_reason is None else (response.finish_reason,),
            genai.INPUT_TOKENS: usage.input_tokens,
            genai.OUTPUT_TOKENS: usage.output_tokens,
            genai.CACHE_READ_TOKENS: usage.cache_read_tokens or None,
            genai.CACHE_WRITE_TOKENS: usage.cache_write_tokens or None,
            genai.REASONING_TOKENS: usage.output_reasoning_tokens or None,
        }
    )
    if notes.texts is not None:
        notes.texts[genai.OUTPUT] = _text(_format().messages_to_otel_messages([response]))


def note_tool(notes: StepNotes, agent: str, name: str, call_id: str, arguments: Mapping[str, Any]) -> None:
    """Say which tool is called, before it is."""
    notes.about = {
        genai.OPERATION: genai.EXECUTE_TOOL,
        genai.TOOL: name,
        genai.TOOL_TYPE: "function",
        genai.TOOL_CALL: call_id,
        genai.AGENT: agent,
    }
    if notes.texts is not None:
        notes.texts[genai.ARGUMENTS] = _text(arguments)


def note_outcome(notes: StepNotes, outcome: Mapping[str, Any]) -> None:
    """Say what a tool has returned, or raised to steer the agent, as `agents` stores it."""
    if outcome["kind"] in ("retry", "failed"):
        notes.error = "ModelRetry" if outcome["kind"] == "retry" else "ToolFailed"
    if notes.texts is not None:
        said = next((outcome[name] for name in ("value", "message") if name in outcome), None)
        if said is not None:
            notes.texts[genai.RESULT] = _text(said)


@cache
def _format() -> InstrumentationSettings:
    # Of the conventions' current form, in which results of tools have a role of their own.
    return InstrumentationSettings(version=6, include_binary_content=False)


def _newest(messages: Sequence[ModelMessage]) -> str:
    """The newest messages that fit, as the conventions write them; at least one."""
    texts: list[str] = []
    size = 0
    for message in reversed(messages):
        parts = [_text(each) for each in reversed(_format().messages_to_otel_messages([message]))]
        size += sum(map(len, parts))
        if texts and size > _MESSAGES:
            break
        texts += parts
    return f"[{','.join(reversed(texts))}]"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _provider(name: str) -> str:
    return genai.PROVIDERS.get(name, name)


def _present(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if value is not None}
