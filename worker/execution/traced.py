"""Traced: what the spans of an attempt say of it, from what it leaves behind."""

from __future__ import annotations

from worker.definitions.definition import Definition
from worker.execution.holdings import Held
from worker.runs.outcome import EndedAttempt
from worker.telemetry.tracing import Traced, Tracer


def trace(tracer: Tracer, ended: EndedAttempt, held: Held | None) -> None:
    """Make the spans of an attempt whose end is written."""
    marks = tracer.marks(ended.run_id, ended.fencing_token)
    if held is None or held.plan is None:
        return
    run, plan, trail = held.run, held.plan, ended.trail
    traced = Traced(
        run_id=run.id,
        attempt=run.attempt,
        fencing_token=run.fencing_token,
        org=plan.org.code,
        issuer=plan.issuer,
        definition=plan.definition.name,
        pipeline=run.handler,
        handler=trail.handler,
        origin=run.origin,
        isolation=run.isolation,
        outcome=ended.outcome,
        state=ended.state,
        reason=ended.reason,
        error_type=_error_type(ended),
        started_at=ended.started_at,
        token_ready_at=trail.token_ready_at,
        ended_at=ended.ended_at,
        flags=_flags(plan.definition, ended, handed_over=marks.handler_began_at is not None),
    )
    tracer.end(traced, marks)


def _error_type(ended: EndedAttempt) -> str | None:
    """A word of a small set, or the exception's class: never its message, which may say anything."""
    if ended.outcome == "no_token" and ended.detail:
        return ended.detail.partition(":")[0]
    if ended.outcome == "failed" and ended.reason in ("error", "retry") and ended.error:
        return ended.error["type"]
    return ended.reason if ended.outcome != "timed_out" else "timeout"


def _flags(definition: Definition, ended: EndedAttempt, *, handed_over: bool) -> list[tuple[str, bool]]:
    """The flags that were evaluated, in order, and whether each had the value that was wanted."""
    gate = definition.requires_flag
    if ended.reason == "flag_off" and gate is not None:
        return [(gate.name, False)]
    if not handed_over:
        return []
    evaluated = [] if gate is None else [(gate.name, True)]
    for variant in definition.variants:
        chosen = variant.handler == ended.trail.handler
        evaluated.append((variant.flag.name, chosen))
        if chosen:
            break
    return evaluated
