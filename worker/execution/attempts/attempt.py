"""Attempt: run → token → claims → handler → outcome, the whole path on one page.

Token, flags and claims are handled here, in the worker. Settings and the handler itself are handled
where the handler runs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from random import Random

from worker.claims.claims import flag_is
from worker.claims.decode import enforce
from worker.claims.record import ClaimsRecord
from worker.errors import (
    ConfigurationError,
    LeaseLost,
    StoreUnavailable,
    TokenError,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.execution.attempts import events
from worker.execution.attempts.inflight import InflightRun
from worker.execution.attempts.plan import DEFAULT_LIMITS, AttemptPlan, Limits, state_without_order
from worker.execution.attempts.run_services import AttemptServices, Tools, redacted
from worker.execution.runners.contract import outcome_of_stop
from worker.runs import outcome as outcomes
from worker.runs.outcome import EndedAttempt, Error, Failed, Outcome, Succeeded, Trail, end_attempt
from worker.runs.run import StoredProgress
from worker.telemetry.events import emit

# Default and maximum pause of a run without a token, in seconds: a new secret may fix it at any time.
PAUSE = 5.0
LONGEST_PAUSE = 60.0
NOTHING_STORED = StoredProgress()


async def attempt(inflight: InflightRun, tools: Tools) -> EndedAttempt:
    """Take one admitted run to an outcome. Errors become outcomes, never exceptions."""
    run, trail, limits = inflight.run, Trail(inflight.run.handler), DEFAULT_LIMITS
    try:
        inflight.plan = plan = await tools.plans.of(run)
        events.run_admitted(run, plan)
        limits = plan.limits(run.handler, tools.handlers.get(run.handler))
        outcome = await _run(inflight, plan, limits, trail, tools)
    except TokenRefused as refused:
        outcome = outcomes.Refused(refused.reason, refused.detail, refused.message)
    except (StoreUnavailable, LeaseLost) as error:
        outcome = outcomes.HandedBack(error.code)
    except (TokenError, Unavailable, ConfigurationError) as error:
        outcome = outcomes.NoToken(pause_after(error, tools.random), f"{error.code}: {error.message}")
    except WorkerError as error:
        outcome = Failed(Error(type(error).__name__, error.message), permanent=True)
    except Exception as error:
        kind, org = type(error).__name__, inflight.org_code
        emit(
            "loop.failed", loop="attempt", error=f"{kind}: {error}", org=org, run=run.id, attempt=run.attempt
        )
        outcome = Failed(Error(kind, "the worker itself failed at this run"))
    if isinstance(outcome, outcomes.Refused) and inflight.plan is not None:
        # Its claims may be corrected before the next run.
        with suppress(WorkerError):
            await tools.tokens.outdate(plan.org, plan.issuer, **tools.token_of(plan, limits))
    if inflight.moved:
        # Recoveries are counted from the last checkpoint that moved.
        run = replace(run, recoveries=0)
    return end_attempt(
        run,
        redacted(outcome),
        trail,
        limits.retry,
        now=tools.clock.now(),
        random=tools.random,
        parked_counts=limits.parked_counts,
    )


async def _run(
    inflight: InflightRun, plan: AttemptPlan, limits: Limits, trail: Trail, tools: Tools
) -> Outcome:
    run, definition, org = inflight.run, plan.definition, plan.org
    if run.start_by is not None and tools.clock.now() > run.start_by:
        return outcomes.Gated("expired")

    # token: a verified and enforced one, mostly from the cache
    scopes, audience, max_age = limits.scopes, definition.audience, definition.max_claims_age
    also_ask = tools.handlers.scopes([variant.handler for variant in definition.variants])
    enforced = tools.tokens.at_hand(
        org, plan.issuer, audience=audience, scopes=scopes, also_ask=also_ask, max_claims_age=max_age
    )
    if inflight.stop.asked:
        return outcome_of_stop(inflight.stop)
    if enforced is None:
        asking = tools.tokens.ensure(
            org, plan.issuer, audience=audience, scopes=scopes, also_ask=also_ask, max_claims_age=max_age
        )
        enforced = await inflight.unless_stopped(asking)
    if enforced is None:
        return outcome_of_stop(inflight.stop)
    inflight.hold(enforced.token)
    claims = enforced.claims
    if (record := enforced.record) is None:
        record = enforced.record = ClaimsRecord.of(claims, tools.digests)
    now = tools.clock.now()
    events.record_claims(trail, record, now)
    if tools.budgets.limits_in_claims:
        await tools.budgets.note_claims(org.id, claims)

    # claims: enforced again, then flag and variant. `ensure` has compared the client, which it alone knows.
    properties = definition.requires_properties
    enforce(claims, org_code=org.code, client_id=None, scopes=scopes, properties=properties)
    flag = definition.requires_flag
    if flag is not None and not flag_is(claims, flag.name, flag.equals):
        return outcomes.Gated("flag_off", flag.name)
    for variant in definition.variants:
        if flag_is(claims, variant.flag.name, variant.flag.equals):
            trail.handler = variant.handler
            break
    # A run keeps the handler that first stored progress: another version would not understand it.
    stored = await tools.checkpoints.load_progress(run.id) if run.may_have_checkpoint else NOTHING_STORED
    trail.handler = stored.handler or trail.handler
    entry = tools.handlers.get(trail.handler)
    if entry is None or (run.isolation == "inline" and not tools.handlers.allows_inline(entry)):
        return outcomes.NoHandler(trail.handler)
    if trail.handler != run.handler:
        scopes = scopes | frozenset(entry.scopes)
        enforce(claims, org_code=org.code, client_id=None, scopes=scopes)

    # handler: in its own process, or inline if the operator allows it
    checkpoint = stored.checkpoint
    state = None
    if entry.state:
        if not definition.serial:
            return state_without_order(plan, entry.name)
        state = await tools.checkpoints.load_state(run)
    services = AttemptServices(inflight, plan, trail, scopes=scopes, checkpoint=checkpoint, tools=tools)
    if run.may_have_checkpoint or entry.state:
        now = tools.clock.now()  # the database was read
    work = plan.work(
        run,
        entry,
        enforced.token,
        claims,
        checkpoint=checkpoint,
        state=None if state is None else state.value,
        limits=limits,
        now=now,
    )
    if tools.budgets.is_limited(org.id):
        found = await tools.budgets.budgets_of(run)
        if found.missing is not None:
            raise TokenRefused("property_missing", found.missing)
        work.budgets = tuple(found.states)
    tools.deadlines.add(inflight.stop, limits.timeout, limits.cancel_grace)
    try:
        outcome = await tools.runners[run.isolation].run(work, services, inflight.stop)
    finally:
        tools.deadlines.discard(inflight.stop)
    if services.refused is not None:
        raise services.refused
    if isinstance(outcome, Succeeded) and outcome.state is not None and not (state and state.commits):
        # A run's process may send anything.
        outcome = Succeeded(outcome.result)
    return outcome


def pause_after(error: WorkerError, random: Random) -> timedelta:
    """How long a run without a token waits: as its issuer says, at most `LONGEST_PAUSE`, plus jitter."""
    seconds = getattr(error, "retry_after", None) or PAUSE
    return timedelta(seconds=min(float(seconds), LONGEST_PAUSE) * random.uniform(1.0, 1.2))
