"""The attributes of spans of models and tools that orgworker knows, by OpenTelemetry's GenAI conventions.

The pinned `opentelemetry-semantic-conventions` has their names and says that they moved to a repository of
their own; a run's process need not have it installed. Pure: no I/O, and no import of OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
AGENT = "gen_ai.agent.name"
TOOL = "gen_ai.tool.name"
TOOL_TYPE = "gen_ai.tool.type"
TOOL_CALL = "gen_ai.tool.call.id"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
# What people, models and tools say.
INSTRUCTIONS = "gen_ai.system_instructions"
INPUT = "gen_ai.input.messages"
OUTPUT = "gen_ai.output.messages"
ARGUMENTS = "gen_ai.tool.call.arguments"
RESULT = "gen_ai.tool.call.result"

Kind = Literal["text", "count", "number", "texts"]

# What a span may say without texts.
ATTRIBUTES: Mapping[str, Kind] = {
    **dict.fromkeys(
        (OPERATION, PROVIDER, REQUEST_MODEL, RESPONSE_MODEL, RESPONSE_ID, AGENT, TOOL, TOOL_TYPE, TOOL_CALL),
        "text",
    ),
    **dict.fromkeys(
        (
            *(INPUT_TOKENS, CACHE_READ_TOKENS, CACHE_WRITE_TOKENS, OUTPUT_TOKENS, REASONING_TOKENS),
            MAX_TOKENS,
        ),
        "count",
    ),
    **dict.fromkeys((TEMPERATURE, TOP_P), "number"),
    FINISH_REASONS: "texts",
}
# Only with `[telemetry] record_content`.
TEXTS = frozenset({INSTRUCTIONS, INPUT, OUTPUT, ARGUMENTS, RESULT})

CHAT = "chat"
EXECUTE_TOOL = "execute_tool"
# Operations that name a span, and the attribute whose value follows in that name.
NAMED_BY: Mapping[str, str] = {CHAT: REQUEST_MODEL, EXECUTE_TOOL: TOOL}

# Names of pydantic-ai's providers that the conventions write otherwise.
PROVIDERS: Mapping[str, str] = {
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "google": "gcp.gemini",
    "google-cloud": "gcp.vertex_ai",
    "mistral": "mistral_ai",
    "xai": "x_ai",
}
