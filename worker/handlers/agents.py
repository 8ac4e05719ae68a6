"""`durable`: an agent of pydantic-ai whose model requests and tool calls are steps of the run."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from pydantic import TypeAdapter

from worker.handlers.completions import Encoded
from worker.handlers.context import Context, batched, given_of
from worker.handlers.results import Duration
from worker.handlers.steps import NAME_LIMIT, StepError, check_name, open_step
from worker.model.batches import PATHS, ModelApi
from worker.model.prices import Kind, model_name, token_kinds

try:
    from genai_prices.data_snapshot import get_snapshot
    from pydantic_ai.agent import AbstractAgent, AgentRun, WrapperAgent
    from pydantic_ai.capabilities import AbstractCapability, CapabilityOrdering
    from pydantic_ai.durable_exec import conversation_id_from_run_id
    from pydantic_ai.exceptions import ApprovalRequired, CallDeferred, ModelRetry, ToolFailed, UserError
    from pydantic_ai.messages import ModelMessage, ModelResponse, ToolReturn, ToolReturnContent
    from pydantic_ai.models import (
        CompletedStreamedResponse,
        Model,
        ModelRequestContext,
        ModelRequestParameters,
        StreamedResponse,
    )
    from pydantic_ai.models.batch import BatchRequest, BatchResult
    from pydantic_ai.models.wrapper import WrapperModel
    from pydantic_ai.output import OutputDataT
    from pydantic_ai.run import AgentRunResult
    from pydantic_ai.settings import ModelSettings
    from pydantic_ai.tools import (
        AgentDepsT,
        DeferredToolRequests,
        DeferredToolResults,
        RunContext,
        ToolApproved,
        ToolDenied,
    )
    from pydantic_ai.toolsets import AbstractToolset, ToolsetTool, WrapperToolset
    from pydantic_ai.usage import RequestUsage

    from worker.handlers.agent_spans import note_outcome, note_request, note_response, note_tool
except ImportError as missing:
    raise ImportError(
        f"durable needs pydantic-ai 2.68 or later ({missing}): install orgworker with its extra pydantic-ai"
    ) from missing

# What counts the tokens of responses.
METER = "llm_tokens"
# Members of the usage of responses with billed calls of the provider's tools.
_CALLS: Mapping[Kind, str] = {
    "web_search": "web_searches",
    "file_search": "storage_searches",
    "code_execution": "code_executions",
}

_log = logging.getLogger(__name__)
_RESPONSE = TypeAdapter(ModelResponse)
_RETURN = TypeAdapter(ToolReturn)
_CONTENT: TypeAdapter[Any] = TypeAdapter(ToolReturnContent)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:/-]")


def durable(
    agent: AbstractAgent[AgentDepsT, OutputDataT],
    ctx: Context[Any, Any],
    *,
    key: str = "",
    meter: str | None = METER,
    approval_timeout: Duration | None = None,
) -> WrapperAgent[AgentDepsT, OutputDataT]:
    """The agent with each model request and tool call as a step of the run.

    Another attempt gets stored responses and results, without a request. The steps are named
    `model:AGENT` and `tool:NAME`. `key` tells apart runs of one agent that happen at the same time. A
    tool with `metadata={"step": False}` is called again; it may use `ctx.step` and `ctx.wait_for` itself.
    The tokens of a response count for `meter`, unless it is None. For a tool that needs approval the run
    waits; after `approval_timeout`, WaitTimeout is raised.

    Raises:
        StepError: the agent has no name, or runs twice at once under one key.
    """
    if not isinstance(ctx, Context):
        raise TypeError("durable needs the Context of an async handler")
    if not agent.name:
        raise StepError('durable: the agent has no name for its steps: Agent(…, name="support")')
    if meter is not None:
        check_name("meter", meter)
    # Those of the same name and key in this attempt are counted together.
    runs = _RUNS.setdefault(ctx, {}).setdefault((agent.name, key), _Runs(agent.name, key))
    return _DurableAgent(agent, runs, lambda number: _Steps(ctx, runs, number, meter, approval_timeout))


class _DurableAgent(WrapperAgent[AgentDepsT, OutputDataT]):
    def __init__(
        self,
        wrapped: AbstractAgent[AgentDepsT, OutputDataT],
        runs: _Runs,
        steps: Callable[[int], _Steps[AgentDepsT]],
    ) -> None:
        super().__init__(wrapped)
        self._runs = runs
        self._steps = steps

    async def run(self, *prompt: Any, **options: Any) -> AgentRunResult[Any]:
        # In a task: whatever the agent awaits inside, the context sees that the handler waits for it, and
        # parks the attempt at once if the agent waits for an answer.
        return await asyncio.create_task(super().run(*prompt, **options))

    # `run`, `run_stream` and the others call this with all options.
    @asynccontextmanager
    async def iter(self, *prompt: Any, **options: Any) -> AsyncGenerator[AgentRun[AgentDepsT, Any]]:
        with self._runs.begin() as number:
            options["capabilities"] = [*(options.get("capabilities") or ()), self._steps(number)]
            async with self.wrapped.iter(*prompt, **options) as run:
                yield run


@dataclass(eq=False)
class _Runs:
    """The runs of one agent under one key in an attempt, which must follow each other."""

    name: str
    key: str
    count: int = 0
    active: bool = False

    @contextmanager
    def begin(self) -> Iterator[int]:
        """The number of the next run, from 1; raises StepError if another one has not ended."""
        if self.active:
            raise StepError(
                f"durable: agent {self.name} runs twice at once: give each run its own key, "
                "durable(agent, ctx, key=…)"
            )
        self.active = True
        self.count += 1
        try:
            yield self.count
        finally:
            self.active = False


_RUNS: WeakKeyDictionary[Context[Any, Any], dict[tuple[str, str], _Runs]] = WeakKeyDictionary()


class _Steps(AbstractCapability[AgentDepsT]):
    """Makes steps of the model requests and tool calls of one run of an agent.

    The key of a request holds a digest of the response before it. If an earlier attempt took another
    path, as after a failed request that a fallback answered, its later responses do not apply.
    """

    def __init__(
        self, ctx: Context[Any, Any], runs: _Runs, number: int, meter: str | None, timeout: Duration | None
    ) -> None:
        self._ctx = ctx
        self._agent = runs.name
        self._meter = meter
        self._approval_timeout = timeout
        self._model = f"model:{_written(runs.name)}"
        self._prefix = f"{runs.key}/{number}" if runs.key else str(number)
        self._requests = itertools.count(1)
        self._digest = ""
        self._calls: Counter[str] = Counter()

    def get_ordering(self) -> CapabilityOrdering:
        # A step holds all that other capabilities add to the request, such as sending it as a batch.
        return CapabilityOrdering(position="outermost")

    def get_default_run_id(self) -> str:
        return f"{self._ctx.run.id}:{self._model}:{self._prefix}"

    def get_default_conversation_id(self, run_id: str) -> str:
        return conversation_id_from_run_id(run_id)

    def get_wrapper_model(self, model: Model) -> Model:
        return _StepModel(model, self)

    def get_wrapper_toolset(self, toolset: AbstractToolset[AgentDepsT]) -> AbstractToolset[AgentDepsT]:
        return toolset.visit_and_replace(lambda leaf: _StepToolset(leaf, self))

    async def handle_deferred_tool_calls(
        self, ctx: RunContext[AgentDepsT], *, requests: DeferredToolRequests
    ) -> DeferredToolResults | None:
        """Wait until people have decided on the tools that need approval."""
        # All are asked at once. An answer is for this call only: its name has a digest of what led to it.
        waits = [
            self._ctx.wait_for(
                f"approve:{_written(call.tool_name)}:{_digest(self._key(call.tool_call_id))[:8]}",
                timeout=self._approval_timeout,
                ask={"tool": call.tool_name, "arguments": call.args_as_dict()},
            )
            for call in requests.approvals
        ]
        answers = await asyncio.gather(*waits)
        ids = (call.tool_call_id for call in requests.approvals)
        return DeferredToolResults(approvals=dict(zip(ids, map(_decision, answers), strict=True)))

    async def request(
        self,
        send: Callable[[], Awaitable[ModelResponse]],
        model: Model,
        messages: list[ModelMessage],
        settings: ModelSettings | None,
        parameters: ModelRequestParameters | None = None,
    ) -> ModelResponse:
        """Send a model request as a step; what the response says it used is stored with it.

        With `parameters` it goes into a batch if the definition says so and the model has batches.
        """

        async def ask() -> Any:
            _note(note_request, self._agent, model, messages, settings)
            response = await send()
            _note(note_response, response)
            if self._meter is not None:
                await self._spend(self._meter, response)
            return _RESPONSE.dump_python(response, mode="json")

        key = self._key(f"{next(self._requests)}")
        batch = None if parameters is None else self._to_batch(model, messages, settings, parameters)
        if batch is None:
            stored = await self._ctx.step(self._model, ask, key=key)
        else:
            stored = await batched(self._ctx, self._model, key, batch.encode, ask, batch.decode, self._meter)
        response = _RESPONSE.validate_python(stored)
        self._digest = _digest(stored)[:12]
        return response

    async def _spend(self, meter: str, response: ModelResponse) -> None:
        """Count what a response says it used, by kind if it names its model."""
        kinds = kinds_of(response.usage)
        try:
            model, provider = model_name(response.model_name), _provider_of(response)
        except ValueError:  # it has none
            if response.usage.total_tokens:
                await self._ctx.spend(meter, response.usage.total_tokens)
            return
        if kinds:
            await self._ctx.spend(meter, {**kinds, "request": 1}, model=model, provider=provider)

    def _to_batch(
        self,
        model: Model,
        messages: list[ModelMessage],
        settings: ModelSettings | None,
        parameters: ModelRequestParameters,
    ) -> _ToBatch | None:
        """The request as one for a batch; None if the definition puts none into batches."""
        given = given_of(self._ctx)
        if not given.batched:
            return None
        # The worker gives it the id that the provider sees.
        request = BatchRequest(
            custom_id="request",
            messages=messages,
            model_settings=settings,
            model_request_parameters=parameters,
        )
        return _ToBatch(model, given.model_apis, request)

    async def call(
        self, name: str, call_id: str, arguments: dict[str, Any], call: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Call a tool as a step. What it raises to steer the agent is stored as well."""
        self._calls[call_id] += 1
        times = self._calls[call_id]

        async def outcome() -> Any:
            _note(note_tool, self._agent, name, call_id, arguments)
            found = await _outcome(call())
            _note(note_outcome, found)
            return found

        key = self._key(call_id if times == 1 else f"{call_id}#{times}")
        return _result(await self._ctx.step(f"tool:{_written(name)}", outcome, key=key))

    def _key(self, last: str) -> str:
        key = "/".join(part for part in (self._prefix, self._digest, last) if part)
        if len(key) <= NAME_LIMIT and key.isprintable():
            return key
        return f"sha256:{_digest(key)}"


@dataclass(frozen=True, slots=True)
class _ToBatch:
    """A request that may go into a batch. `apis` are those of `[batches]`."""

    model: Model
    apis: tuple[ModelApi, ...]
    request: BatchRequest

    async def encode(self) -> Encoded | None:
        """The request as its provider takes it; None if it cannot go into a batch."""
        model = self.model
        if model.batch_max_requests is None:
            return None
        api = next((one for one in self.apis if one.answers(model.system, model.base_url or "")), None)
        if api is None:
            return None
        try:
            encoded = await model.batch_encode(self.request)
        except UserError as error:
            _log.info("a request of %s is sent on its own: %s", model.model_name, error)
            return None
        betas = json.loads(encoded.group).get("betas") or ()
        return Encoded(api, PATHS[api.provider][0], encoded.body, tuple(betas))

    def decode(self, answer: Mapping[str, Any]) -> Any:
        result = BatchResult(custom_id=self.request.custom_id, status="succeeded", body=answer["body"])
        return _RESPONSE.dump_python(self.model.batch_decode(result, self.request), mode="json")


class _StepModel(WrapperModel):
    """A model whose requests are steps. A stream delivers its response once it is complete."""

    def __init__(self, wrapped: Model, steps: _Steps[Any]) -> None:
        super().__init__(wrapped)
        self._steps = steps

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        return await self._steps.request(
            lambda: self.wrapped.request(messages, model_settings, model_request_parameters),
            self.wrapped,
            messages,
            model_settings,
            model_request_parameters,
        )

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        response = await self.request(messages, model_settings, model_request_parameters)
        yield CompletedStreamedResponse(
            response, model_request_parameters=model_request_parameters, replay_events=True
        )

    async def compact_messages(
        self, request_context: ModelRequestContext, *, instructions: str | None = None
    ) -> ModelResponse:
        return await self._steps.request(
            lambda: self.wrapped.compact_messages(request_context, instructions=instructions),
            self.wrapped,
            request_context.messages,
            request_context.model_settings,
        )


@dataclass
class _StepToolset(WrapperToolset[AgentDepsT]):
    """Tools whose calls are steps."""

    steps: _Steps[AgentDepsT] = field(repr=False)

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[AgentDepsT], tool: ToolsetTool[AgentDepsT]
    ) -> Any:
        if (tool.tool_def.metadata or {}).get("step") is False or ctx.tool_call_id is None:
            return await self.wrapped.call_tool(name, tool_args, ctx, tool)
        return await self.steps.call(
            ctx.tool_name or name,
            ctx.tool_call_id,
            tool_args,
            lambda: self.wrapped.call_tool(name, tool_args, ctx, tool),
        )


def _note(say: Callable[..., None], *about: Any) -> None:
    """Say something for the span of the current step, if it has one. What fails is left out."""
    step = open_step()
    if step is not None and step.notes is not None:
        with suppress(Exception):
            say(step.notes, *about)


async def _outcome(call: Awaitable[Any]) -> dict[str, Any]:
    """What a tool returned, or raised to steer the agent, as JSON. Raises other errors: nothing is stored."""
    try:
        result = await call
    except (ModelRetry, ToolFailed) as error:
        return {"kind": "retry" if isinstance(error, ModelRetry) else "failed", "message": error.message}
    except ApprovalRequired as error:
        return {"kind": "approval", "metadata": error.metadata}
    except CallDeferred as error:
        return {"kind": "deferred", "metadata": error.metadata, "waits_for": error.kind}
    if isinstance(result, ToolReturn):
        return {"kind": "tool_return", "value": _RETURN.dump_python(result, mode="json")}
    return {"kind": "content", "value": _CONTENT.dump_python(result, mode="json")}


def _result(outcome: dict[str, Any]) -> Any:
    match outcome["kind"]:
        case "content":
            return _CONTENT.validate_python(outcome["value"])
        case "tool_return":
            return _RETURN.validate_python(outcome["value"])
        case "retry":
            raise ModelRetry(outcome["message"])
        case "failed":
            raise ToolFailed(outcome["message"])
        case "approval":
            raise ApprovalRequired(outcome["metadata"])
    raise CallDeferred(outcome["metadata"], kind=outcome["waits_for"])


def _decision(answer: Any) -> ToolApproved | ToolDenied:
    """`true` approves a call, and an object does with these arguments; a text denies it for that reason."""
    if answer is True:
        return ToolApproved()
    if isinstance(answer, dict):
        return ToolApproved(override_args=answer)
    return ToolDenied(answer) if isinstance(answer, str) and answer else ToolDenied()


def kinds_of(usage: RequestUsage) -> dict[Kind, int]:
    """What a request used, by kind; those that are 0 are left out. The tokens add up to `total_tokens`."""
    kinds = token_kinds(
        usage.input_tokens,
        usage.output_tokens,
        read=usage.cache_read_tokens,
        written=usage.cache_write_tokens,
        hour=usage.cache_write_1h_tokens,
        reasoning=usage.output_reasoning_tokens,
    )
    for kind, name in _CALLS.items():
        # Members that only responses with such calls have.
        kinds[kind] = getattr(usage, name, 0) or 0
    return {kind: units for kind, units in kinds.items() if units}


def _provider_of(response: ModelResponse) -> str | None:
    """The provider by its URL, which is more precise, as of a gateway; else by its name."""
    if response.provider_url:
        with suppress(LookupError):
            return get_snapshot().find_provider(None, None, response.provider_url).id
    return None if response.provider_name is None else model_name(response.provider_name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _written(name: str) -> str:
    """A name of another program as part of a step's name."""
    return _NOT_IN_NAMES.sub("-", name)[: NAME_LIMIT - 20]
