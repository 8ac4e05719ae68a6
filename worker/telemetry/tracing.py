"""Tracing: a span for each attempt, with one for its token and one for its handler, where that is asked for.

All three are made at the end of the attempt, from what it leaves behind anyway; only the
handler's place in the trace is told ahead, as a W3C traceparent. Without a tracer each
call here is a look at one variable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

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
    "gated": "skip",
}
# Results whose spans have the status error, and so an error.type.
BAD: frozenset[Result] = frozenset({"failure", "error", "timeout"})


@dataclass(frozen=True, slots=True)
class Traced:
    """An attempt that has ended, as its spans say it; it holds no token, no property and no message.

    `pipeline` is the definition's handler, `handler` the one that was chosen,
    `flags` each flag that was evaluated, and whether it was on.
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


@dataclass(slots=True)
class Marks:
    """When an attempt asked for its token, and when its handler was handed over to a runner."""

    token_began_at: datetime | None = None
    handler_began_at: datetime | None = None


class Tracer(Protocol):
    """Makes spans of attempts; all calls come from the worker's loop."""

    def hand_over(self, run_id: str, fencing_token: int) -> str | None:
        """The traceparent of a handler that is to be called now."""
        ...

    def marks(self, run_id: str, fencing_token: int) -> Marks:
        """What is known of an attempt that has ended; asked for once."""
        ...

    def end(self, traced: Traced, marks: Marks) -> None:
        """Make the spans of an attempt that has ended."""
        ...


_tracer: Tracer | None = None


def use(tracer: Tracer) -> Callable[[], None]:
    """Trace with this one from now on; returns how to end that."""
    global _tracer
    _tracer = tracer

    def end() -> None:
        global _tracer
        _tracer = None

    return end


def in_use() -> Tracer | None:
    """The tracer, or None where nobody asked for traces."""
    return _tracer


def traceparent(run_id: str, fencing_token: int) -> str | None:
    """The W3C traceparent of a handler that is to be called now, or None without a tracer."""
    return None if _tracer is None else _tracer.hand_over(run_id, fencing_token)
