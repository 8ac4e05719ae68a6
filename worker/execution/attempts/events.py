"""What an attempt leaves behind: run events, trace spans, and a snapshot of the claims it acted under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.claims.claims import Claims
from worker.clock import to_text
from worker.definitions.definition import Definition
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.plan import AttemptPlan
from worker.ids import RunId
from worker.runs.outcome import EndedAttempt, Trail
from worker.runs.run import AdmittedRun
from worker.telemetry import tracing
from worker.telemetry.events import emit
from worker.telemetry.tracing import Traced, Tracer

# Claims are shared by all runs of a token: what they come to is kept for the newest so many.
BOUND = 10_000


@dataclass(frozen=True, slots=True)
class _Noted:
    """What stands in the row of an attempt made under these claims."""

    claims: Claims
    flags: Mapping[str, Any]
    shown: Mapping[str, Any]
    fingerprint: str


_noted: dict[int, _Noted] = {}


def note(trail: Trail, claims: Claims, at: datetime) -> None:
    """Note a token's claims: of properties only names and types, since a value may be a secret."""
    noted = _noted.get(id(claims))
    if noted is None or noted.claims is not claims:
        noted = _noted[id(claims)] = _note(claims)
        if len(_noted) > BOUND:
            del _noted[next(iter(_noted))]
    trail.token_ready_at = at
    trail.jti = claims.jti
    trail.flags = noted.flags
    trail.claims = noted.shown
    trail.claims_hash = noted.fingerprint


def _note(claims: Claims) -> _Noted:
    return _Noted(
        claims=claims,
        flags={name: flag.value for name, flag in claims.flags.items()},
        shown={
            "org_code": claims.org_code,
            "client_id": claims.client_id,
            "scopes": sorted(claims.scopes),
            "properties": {name: type(value).__name__ for name, value in sorted(claims.properties.items())},
            "issued_at": to_text(claims.issued_at),
            "expires_at": to_text(claims.expires_at),
        },
        fingerprint=fingerprint(claims),
    )


def fingerprint(claims: Claims) -> str:
    """Equal for claims that configure alike: of properties, flags and scopes, not of lifetimes."""
    content = {
        "scopes": sorted(claims.scopes),
        "properties": claims.properties,
        "flags": {name: flag.value for name, flag in claims.flags.items()},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def trace(tracer: Tracer, ended: EndedAttempt, held: InflightRun | None) -> None:
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


def tell_admission(run: AdmittedRun, plan: AttemptPlan) -> None:
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


def tell_end(ended: EndedAttempt, held: InflightRun | None) -> None:
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


def tell_fenced_out(run_id: RunId, attempt: int, fencing_token: int, held: InflightRun | None) -> None:
    """One event for a run that was held here and is another's."""
    emit("run.fenced_out", org=_org(held), run=run_id, attempt=attempt, fencing_token=fencing_token)


def tell_unstorable(ended: EndedAttempt, error: Exception, held: InflightRun | None) -> None:
    """One event for an end that the database does not take as it is."""
    emit(
        "result.unstorable",
        org=_org(held),
        run=ended.run_id,
        attempt=ended.attempt,
        error=type(error).__name__,
    )


def tell_fault(held: InflightRun, error: Exception) -> None:
    """One event for a mistake of the worker's own in carrying a run."""
    emit(
        "loop.failed",
        loop="attempt",
        error=f"{type(error).__name__}: {error}",
        org=_org(held),
        run=held.run.id,
        attempt=held.run.attempt,
    )


def _org(held: InflightRun | None) -> str | None:
    return None if held is None or held.plan is None else held.plan.org.code
