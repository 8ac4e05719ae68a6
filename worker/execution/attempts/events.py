"""What an attempt leaves behind: events, trace spans, and a record of the claims it acted under."""

from __future__ import annotations

from datetime import datetime

from worker.claims.enforced import ClaimsRecord
from worker.definitions.definition import Definition
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.plan import AttemptPlan
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt, Trail, summary
from worker.runs.run import AdmittedRun
from worker.telemetry import tracing
from worker.telemetry.events import emit
from worker.telemetry.tracing import Traced, Tracer


def record_claims(trail: Trail, record: ClaimsRecord, at: datetime) -> None:
    """Record a token's claims."""
    trail.token_ready_at = at
    trail.jti = record.jti
    trail.flags = record.flags
    trail.claims = record.claims
    trail.claims_hash = record.fingerprint


def run_admitted(run: AdmittedRun, plan: AttemptPlan) -> None:
    """Emit `run.admitted`, with the lateness in seconds."""
    emit(
        "run.admitted",
        org=plan.org.code,
        run=run.id,
        definition=plan.definition.name,
        handler=run.handler,
        attempt=run.attempt,
        fencing_token=run.fencing_token,
        lateness=round((run.started_at - run.available_at).total_seconds(), 3),
    )


def run_ended(ended: EndedAttempt, inflight: InflightRun | None) -> None:
    """Emit `run.ended` for an end that is written, and its trace spans if tracing is on."""
    plan = None if inflight is None else inflight.plan
    emit(
        "run.ended",
        org=plan and plan.org.code,
        run=ended.run_id,
        definition=plan and plan.definition.name,
        handler=ended.trail.handler,
        attempt=ended.attempt,
        outcome=ended.outcome,
        state=ended.shown_state,
        reason=ended.reason,
        detail=ended.detail,
        seconds=round((ended.ended_at - ended.started_at).total_seconds(), 3),
        error_cause=ended.error_cause,
        # `lost` and the like are causes without an error of a handler.
        error_summary=summary(ended.error) if ended.error and ended.state == "failed" else None,
    )
    for wait in ended.trail.asks if ended.state == "parked" else ():
        emit(
            "run.asks",
            org=plan and plan.org.code,
            run=ended.run_id,
            definition=plan and plan.definition.name,
            attempt=ended.attempt,
            wait=wait,
        )
    tracer = tracing.in_use()
    if tracer is not None:
        trace(tracer, ended, inflight)


def attempt_ended(ended: EndedAttempt, inflight: InflightRun | None) -> None:
    """Emit `attempt.ended`: a host's worker knows what becomes of the run, and emits `run.ended`."""
    emit(
        "attempt.ended",
        org=inflight and inflight.org_code,
        run=ended.run_id,
        handler=ended.trail.handler,
        attempt=ended.attempt,
        outcome=ended.outcome,
        seconds=round((ended.ended_at - ended.started_at).total_seconds(), 3),
    )


def run_fenced_out(run_id: RunId, attempt: int, fencing_token: int, inflight: InflightRun | None) -> None:
    """Emit `run.fenced_out` for a run that this process held and that another worker owns."""
    org = inflight and inflight.org_code
    emit("run.fenced_out", org=org, run=run_id, attempt=attempt, fencing_token=fencing_token)


def trace(tracer: Tracer, ended: EndedAttempt, inflight: InflightRun | None) -> None:
    marks = tracer.marks(ended.run_id, ended.fencing_token)
    if inflight is None or inflight.plan is None:
        return
    run, plan, trail = inflight.run, inflight.plan, ended.trail
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
        state=ended.shown_state,
        reason=ended.reason,
        error_type=_error_type(ended),
        started_at=ended.started_at,
        token_ready_at=trail.token_ready_at,
        ended_at=ended.ended_at,
        flags=_evaluated_flags(plan.definition, ended, handler_called=marks.handler_began_at is not None),
    )
    tracer.end(traced, marks)


def _error_type(ended: EndedAttempt) -> str | None:
    """A word of a small set, or the exception's class; never its message, which may contain anything."""
    if ended.outcome == "no_token" and ended.detail:
        return ended.detail.partition(":")[0]
    if ended.outcome == "failed" and ended.reason in ("error", "retry") and ended.error:
        return ended.error["type"]
    return ended.reason if ended.outcome != "timed_out" else "timeout"


def _evaluated_flags(
    definition: Definition, ended: EndedAttempt, *, handler_called: bool
) -> list[tuple[str, bool]]:
    """The flags that were evaluated, in order, and whether each had the required value."""
    required = definition.requires_flag
    if ended.reason == "flag_off" and required is not None:
        return [(required.name, False)]
    if not handler_called:
        return []
    evaluated = [] if required is None else [(required.name, True)]
    for variant in definition.variants:
        chosen = variant.handler == ended.trail.handler
        evaluated.append((variant.flag.name, chosen))
        if chosen:
            break
    return evaluated
