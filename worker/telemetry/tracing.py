"""Tracing: one span for each attempt, with spans below it for its token, its handler, requests and steps.

Those of the attempt, its token and its handler are made when the attempt has ended, those of requests and
steps before; only the handler's W3C traceparent is made first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

Result = Literal["success", "failure", "error", "timeout", "cancellation", "skip"]

# How an attempt ended -> `cicd.pipeline.result` of OpenTelemetry's semantic conventions.
RESULTS: Mapping[str, Result] = {
    "succeeded": "success",
    "failed": "failure",
    "retry": "failure",
    "timed_out": "timeout",
    "refused": "failure",
    "no_token": "error",
    "lost": "error",
    "cancelled": "cancellation",
    "handed_back": "cancellation",
    "snoozed": "skip",
    "parked": "skip",
    "gated": "skip",
}
# Results whose spans have the status error, and so an error.type.
BAD: frozenset[Result] = frozenset({"failure", "error", "timeout"})


@dataclass(frozen=True, slots=True)
class Traced:
    """An ended attempt, without tokens, properties and messages.

    `pipeline` is the definition's handler, `handler` the chosen variant, `flags` each evaluated flag
    and whether it was on.
    """

    run_id: str
    attempt: int
    fencing_token: int
    org: str
    issuer: str
    definition: str
    pipeline: str
    handler: str
    origin: str
    isolation: str
    outcome: str
    state: str
    reason: str | None
    error_type: str | None
    started_at: datetime
    token_ready_at: datetime | None
    ended_at: datetime
    flags: Sequence[tuple[str, bool]] = field(default=())
    parent: str | None = None
    """The traceparent of the handler that started the run."""


@dataclass(slots=True)
class Marks:
    """When an attempt requested its token and started its handler; its first returned stored results."""

    token_began_at: datetime | None = None
    handler_began_at: datetime | None = None
    replayed: list[StepSpan] = field(default_factory=list)


# The methods of RFC 9110 and RFC 5789, which name spans; semantic conventions call any other one so.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
OTHER_METHOD = "_OTHER"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """A request of a run, without path and query. The times are Unix nanoseconds.

    `status` is that of the response, None without one; `error` then says why, in a word such as `timeout`.
    """

    method: str
    host: str
    port: int
    started: int
    ended: int
    status: int | None = None
    error: str | None = None


# Steps of an attempt that have spans, and its stored results that have events.
MAX_STEPS = 1_000
MAX_REPLAYED = 100
# What an attempt reports of its steps: nothing, their spans, or these with texts.
Detail = Literal["none", "steps", "texts"]


@dataclass(frozen=True, slots=True)
class StepSpan:
    """A call of a step's function; with `replayed` a stored result that was returned without a call.

    `error` is the class of what it raised. `about` has attributes of `genai.ATTRIBUTES`, and `texts` what
    people, models and tools said, by names of `genai.TEXTS`.
    """

    name: str
    key: str | None
    occurrence: int
    started_at: datetime
    ended_at: datetime
    replayed: bool = False
    error: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step of a running attempt, masked; `parent` as in `Traced`."""

    run_id: str
    attempt: int
    fencing_token: int
    org: str
    definition: str
    span: StepSpan
    parent: str | None = None


class Tracer(Protocol):
    """See `otel.OtelTracer`; all calls come from the worker's event loop."""

    @property
    def records_texts(self) -> bool: ...
    def hand_over(self, run_id: str, fencing_token: int, parent: str | None = None) -> str | None: ...
    def marks(self, run_id: str, fencing_token: int) -> Marks: ...
    def end(self, traced: Traced, marks: Marks) -> None: ...
    def request(self, traceparent: str, request: TracedRequest) -> None: ...
    def step(self, step: TracedStep) -> None: ...


_tracer: Tracer | None = None


def use(tracer: Tracer) -> Callable[[], None]:
    """Set the tracer; returns a function that removes it."""
    global _tracer
    _tracer = tracer

    def end() -> None:
        global _tracer
        _tracer = None

    return end


def in_use() -> Tracer | None:
    """The tracer, or None if tracing is off."""
    return _tracer


def traceparent(run_id: str, fencing_token: int, parent: str | None = None) -> str | None:
    """The W3C traceparent of a handler that is about to be called, or None if tracing is off.

    `parent` is that of the handler that started the run, if one did.
    """
    return None if _tracer is None else _tracer.hand_over(run_id, fencing_token, parent)


def detail(traceparent: str | None = "") -> Detail:
    """What an attempt reports of its steps: nothing if its traceparent is None or not sampled."""
    if _tracer is None or traceparent is None or traceparent.endswith("-00"):
        return "none"
    return "texts" if _tracer.records_texts else "steps"


def request_span(traceparent: str | None, request: TracedRequest) -> None:
    """Make the span of a request that an attempt has sent; nothing if tracing is off.

    `traceparent` is that of the attempt's handler, as `Work` has it.
    """
    if _tracer is not None and traceparent is not None:
        _tracer.request(traceparent, request)
