"""Attempt: run → token → claims → handler → outcome, the whole path on one page.

Every engine calls this. Token, gates and claims are handled here, in the worker;
only settings and the handler itself are the child's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from random import Random

from worker.claims.claims import choose_variant, is_on
from worker.claims.decode import enforce
from worker.clock import Clock
from worker.errors import (
    ConfigurationError,
    LeaseLost,
    StoreUnavailable,
    TokenError,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.execution.attempts.deadline import Deadline, Deadlines
from worker.execution.attempts.events import note, tell_admission, tell_fault
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.plan import UNKNOWN, AttemptPlan, Plans, Terms
from worker.execution.attempts.run_services import AttemptServices, CheckpointStore, TokenSource, redacted
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.runners.contract import Runner, Work, stopped
from worker.runs.outcome import (
    EndedAttempt,
    Error,
    Failed,
    Gated,
    HandedBack,
    NoHandler,
    NoToken,
    Outcome,
    Refused,
    Trail,
    settle,
)
from worker.runs.run import Isolation
from worker.telemetry.tracing import traceparent

# Seconds that a run without a token waits where the issuer does not say, and at most.
PAUSE = 5.0
LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Tools:
    """What every attempt of this process shares."""

    plans: Plans
    tokens: TokenSource
    offers: HandlerRegistry
    runners: Mapping[Isolation, Runner]
    checkpoints: CheckpointStore
    journal: RunLogWriter
    clock: Clock
    random: Random
    deadlines: Deadlines = field(default_factory=Deadlines)


async def attempt(held: InflightRun, tools: Tools) -> EndedAttempt:
    """Carry one admitted run to an outcome: whatever happens is an outcome, never an exception."""
    run, trail, terms = held.run, Trail(held.run.handler), UNKNOWN
    try:
        held.plan = plan = await tools.plans.of(run)
        tell_admission(run, plan)
        terms = plan.terms(run.handler, tools.offers.get(run.handler))
        outcome = await _carry(held, plan, terms, trail, tools)
    except TokenRefused as refused:
        outcome = Refused(refused.reason, refused.detail, refused.message)
    except (StoreUnavailable, LeaseLost) as error:
        outcome = HandedBack(error.code)
    except (TokenError, Unavailable, ConfigurationError) as error:
        outcome = NoToken(pause_after(error, tools.random), f"{error.code}: {error.message}")
    except WorkerError as error:
        outcome = Failed(Error(type(error).__name__, error.message), permanent=True)
    except Exception as error:
        tell_fault(held, error)
        outcome = Failed(Error(type(error).__name__, "the worker itself failed at this run"))
    if held.moved:
        # Being lost is counted from the last checkpoint that moved.
        run = replace(run, recoveries=0)
    return settle(run, redacted(outcome), trail, terms.retry, now=tools.clock.now(), random=tools.random)


async def _carry(held: InflightRun, plan: AttemptPlan, terms: Terms, trail: Trail, tools: Tools) -> Outcome:
    run, definition, org = held.run, plan.definition, plan.org
    if run.start_by is not None and tools.clock.now() > run.start_by:
        return Gated("expired")

    # token: every one that `ensure` gives is verified and enforced already
    scopes = terms.scopes
    enforced = await held.unless_stopped(
        tools.tokens.ensure(
            org,
            plan.issuer,
            audience=definition.audience,
            scopes=scopes,
            also_ask=tools.offers.scopes([variant.handler for variant in definition.variants]),
            max_claims_age=definition.max_claims_age,
        )
    )
    if enforced is None:
        return stopped(held.stop)
    claims = enforced.claims
    note(trail, claims, tools.clock.now())

    # claims: compared once more, then gates and variant
    enforce(
        claims,
        org_code=org.code,
        client_id=None,  # compared by `ensure`, which knows who asked
        scopes=scopes,
        properties=definition.requires_properties,
    )
    if definition.requires_flag is not None and not is_on(claims, definition.requires_flag):
        return Gated("flag_off", definition.requires_flag.name)
    variant = choose_variant(definition.variants, claims)
    trail.handler = run.handler if variant is None else variant.handler
    entry = tools.offers.get(trail.handler)
    if entry is None or (run.isolation == "inline" and not tools.offers.allows_inline(entry)):
        return NoHandler(trail.handler)
    if trail.handler != run.handler:
        scopes = scopes | frozenset(entry.scopes)
        enforce(claims, org_code=org.code, client_id=None, scopes=scopes)

    # handler: in its own process, or inline where the operator allows it
    checkpoint = await tools.checkpoints.load_checkpoint(run.id) if run.may_have_checkpoint else None
    link = AttemptServices(held, plan, trail, scopes=scopes, checkpoint=checkpoint, services=tools)
    work = Work(
        run_id=run.id,
        attempt=run.attempt,
        fencing_token=run.fencing_token,
        idempotency_key=run.idempotency_key,
        scheduled_for=run.scheduled_for,
        org_code=org.code,
        org_name=plan.org_name,
        definition=definition.name,
        handler=trail.handler,
        entry_point=entry.entry_point,
        params={**definition.params, **(run.params or {})},
        claims=claims,
        token=enforced.token,
        api_origins=plan.api_origins,
        timeout_at=tools.clock.now() + terms.timeout,
        checkpoint=checkpoint,
        memory=terms.memory,
        isolation=run.isolation,
        traceparent=traceparent(run.id, run.fencing_token),
        private_origins=tools.plans.private_origins,
        insecure_origins=tools.plans.insecure_origins,
    )
    with Deadline(tools.deadlines, held.stop, terms.timeout, terms.cancel_grace):
        outcome = await tools.runners[run.isolation].run(work, link, held.stop)
    if link.refused is not None:
        raise link.refused
    return outcome


def pause_after(error: WorkerError, random: Random) -> timedelta:
    """How long a run without a token waits: as its issuer says, at most a minute, spread a little.

    A minute, since a new secret or an operator may mend it at any time, and to ask
    the token cache again costs no request while an org is parked.
    """
    seconds = getattr(error, "retry_after", None) or PAUSE
    return timedelta(seconds=min(float(seconds), LONGEST_PAUSE) * random.uniform(1.0, 1.2))
