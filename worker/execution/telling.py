"""Telling: the events of a run's admission and of its attempt's end, with what its plan knows."""

from __future__ import annotations

from worker.execution.holdings import Held
from worker.execution.plans import Plan
from worker.execution.traced import trace
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import AdmittedRun
from worker.telemetry import tracing
from worker.telemetry.events import emit


def tell_admission(run: AdmittedRun, plan: Plan) -> None:
    """One event for a run that is this worker's now, with its lateness in seconds."""
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


def tell_end(ended: EndedAttempt, held: Held | None) -> None:
    """One event for an attempt whose end is written, and its spans where they are wanted."""
    plan = None if held is None else held.plan
    emit(
        "run.ended",
        org=plan and plan.org.code,
        run=ended.run_id,
        definition=plan and plan.definition.name,
        handler=ended.trail.handler,
        attempt=ended.attempt,
        outcome=ended.outcome,
        state=ended.state,
        reason=ended.reason,
        detail=ended.detail,
        seconds=round((ended.ended_at - ended.started_at).total_seconds(), 3),
        error_cause=ended.error_cause,
    )
    tracer = tracing.in_use()
    if tracer is not None:
        trace(tracer, ended, held)


def tell_fenced_out(run_id: RunId, attempt: int, fencing_token: int, held: Held | None) -> None:
    """One event for a run that was held here and is another's."""
    emit("run.fenced_out", org=_org(held), run=run_id, attempt=attempt, fencing_token=fencing_token)


def tell_unstorable(ended: EndedAttempt, error: Exception, held: Held | None) -> None:
    """One event for an end that the database does not take as it is."""
    emit(
        "result.unstorable",
        org=_org(held),
        run=ended.run_id,
        attempt=ended.attempt,
        error=type(error).__name__,
    )


def tell_fault(held: Held, error: Exception) -> None:
    """One event for a mistake of the worker's own in carrying a run."""
    emit(
        "loop.failed",
        loop="attempt",
        error=f"{type(error).__name__}: {error}",
        org=_org(held),
        run=held.run.id,
        attempt=held.run.attempt,
    )


def _org(held: Held | None) -> str | None:
    return None if held is None or held.plan is None else held.plan.org.code
