"""Attempt: run → token → claims → handler → outcome, the whole path on one page.

Token, flags and claims are handled here, in the worker. Settings and the handler itself are handled
where the handler runs. For a run on a host, a worker calls `prepare` when the host takes the run and
`conclude` when it ends; the host calls the handler in between.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random

from worker.engine.attempt.answers import Running, SpanRoom
from worker.engine.attempt.inflight import InflightRun, record_claims, run_admitted
from worker.engine.attempt.plan import (
    DEFAULT_LIMITS,
    AttemptPlan,
    Limits,
    cannot_be_sealed,
    state_without_order,
)
from worker.engine.attempt.run_log import mask_trail, redacted
from worker.engine.attempt.tools import HandlerTools, Tools
from worker.engine.runners.contract import LEASE_LOST, LONGEST_PAUSE, Stopped, Work, outcome_of_stop
from worker.errors import (
    ConfigurationError,
    LeaseLost,
    StoreUnavailable,
    TokenError,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.guard.claims import Claims, flag_is
from worker.guard.decode import enforce
from worker.handlers.catalogue import HandlerEntry
from worker.model.bindings import OrgSecrets
from worker.model.claims import ClaimsRecord, Enforced
from worker.model.egress import Gate
from worker.model.rollouts.rollout import VersionAsk
from worker.model.runs import outcome as outcomes
from worker.model.runs.budgets import BudgetState
from worker.model.runs.children import BY_PARENT, EXCEEDS, MAX_CHILD_RESULT
from worker.model.runs.outcome import EndedAttempt, Error, Failed, Outcome, Succeeded, Trail, end_attempt
from worker.model.runs.run import AdmittedRun, StoredProgress
from worker.telemetry.events import emit

# Default pause of a run without a token, in seconds.
PAUSE = 5.0
NOTHING_STORED = StoredProgress()
NO_SECRETS: OrgSecrets = {}
# Why a run is refused whose token is right.
SECRET_MISSING = "secret_missing"  # noqa: S105 - a reason, not a secret
SECRET_BOUND = "secret_bound"  # noqa: S105
# A new token would change nothing about these.
NOT_OF_TOKENS = (SECRET_MISSING, SECRET_BOUND, EXCEEDS)
NO_BROKER = "no broker is here that could send it: install the feature egress"


@dataclass(slots=True, eq=False, repr=False)
class Prepared:
    """An attempt whose handler may be called; `commits`: its success may change the definition's state."""

    work: Work
    limits: Limits
    commits: bool


async def attempt(inflight: InflightRun, tools: Tools) -> EndedAttempt:
    """Take one admitted run to an outcome. Errors become outcomes, never exceptions."""
    trail = Trail(inflight.run.handler)
    try:
        prepared = await prepare(inflight, trail, tools)
        if isinstance(prepared, Prepared):
            # Not for one on a host: a worker of its pool would have to send its requests.
            _with_batches(prepared.work, inflight, tools)
            outcome = await run_handler(prepared, inflight, trail, tools)
        else:
            outcome = prepared
    except Exception as error:
        outcome = outcome_of_error(error, inflight, tools.random)
    return await conclude(inflight, outcome, trail, tools)


def _with_batches(work: Work, inflight: InflightRun, tools: Tools) -> None:
    """Let the model requests of an attempt go into batches, if its definition says so."""
    batches, plan = tools.batches, inflight.plan
    work.model_apis = batches.apis
    is_batched = plan is not None and plan.definition.model_requests == "batch"
    work.batched = is_batched and batches.serves(inflight.run.pool)
    if work.batched:
        inflight.gate = Gate(work.egress.lists, work.api_origins)


async def prepare(inflight: InflightRun, trail: Trail, tools: Tools) -> Prepared | Outcome:
    """All of an attempt up to its handler, or the outcome if the handler must not be called.

    Raises:
        Exception: as `outcome_of_error` takes it.
    """
    run = inflight.run
    plan = await tools.plans.of(run)
    inflight.begin(plan)
    run_admitted(run, plan)
    limits = limits_of(inflight, tools)
    if run.start_by is not None and tools.clock.now() > run.start_by:
        return outcomes.Gated("expired")
    if (command := tools.handlers.unapproved(run.handler, plan.definition)) is not None:
        return outcomes.NotApproved(command)
    if run.origin == "child" and (beyond := await _beyond_parent(limits, inflight, plan, tools)) is not None:
        return beyond

    enforced = await _token(inflight, plan, limits, trail, tools)
    if not isinstance(enforced, Enforced):
        return enforced
    if (gated := _claims(enforced.claims, inflight, plan, trail, tools)) is not None:
        return gated
    stored = await tools.store.load_progress(run.id) if run.may_have_checkpoint else NOTHING_STORED
    await _version(stored, enforced.claims, inflight, plan, trail, tools)
    entry = _handler(stored, enforced.claims, inflight, plan, trail, tools)
    if not isinstance(entry, HandlerEntry):
        return entry
    state = await tools.store.load_state(run) if entry.state else None
    secrets = await _secrets(entry, inflight, plan, tools) if entry.secrets else NO_SECRETS
    if isinstance(secrets, outcomes.Refused):
        return secrets
    given = run, entry, enforced, stored, state, secrets, limits
    work = plan.work(*given, now=tools.clock.now(), parent_trace=inflight.parent_trace)
    inflight.audiences = work.egress.audiences
    may_start(inflight, plan, entry, limits, work.traceparent)
    if tools.store.is_limited(plan.org.id):
        work.budgets = await _budgets(run, tools)
    return Prepared(work, limits, commits=state is not None and state.commits)


def may_start(
    inflight: InflightRun,
    plan: AttemptPlan,
    entry: HandlerEntry,
    limits: Limits,
    traceparent: str | None = None,
) -> None:
    """Keep which handlers an attempt may start, and what those may have."""
    if entry.children:
        inflight.children = frozenset(entry.children)
        cap = plan.cap(entry, limits)
        inflight.cap = replace(cap, scopes=inflight.scopes, traceparent=traceparent)


async def _beyond_parent(
    limits: Limits, inflight: InflightRun, plan: AttemptPlan, tools: Tools
) -> outcomes.Refused | outcomes.Cancelled | None:
    """The refusal of a child whose handler declares more than that of its parent; None if it does not.

    Before its token is requested, which would have the scopes of the child. Without the row of its parent,
    nothing says what it may have.
    """
    entry, cap = tools.handlers.get(inflight.run.handler), await tools.store.cap_of(inflight.run)
    if cap is None:
        return outcomes.Cancelled(BY_PARENT)
    inflight.parent_trace = cap.traceparent
    more = None if entry is None else cap.excess(plan.cap(entry, limits))
    if entry is None or more is None:
        return None
    return outcomes.Refused(
        EXCEEDS, more, f"{entry.name} declares {more}, which its parent {cap.handler} lacks"
    )


async def _token(
    inflight: InflightRun, plan: AttemptPlan, limits: Limits, trail: Trail, tools: Tools
) -> Enforced | Stopped:
    """A verified and enforced token, mostly from the cache, whose claims are recorded."""
    inflight.scopes = limits.scopes
    want = plan.want(limits, tools.handlers)
    enforced = tools.tokens.at_hand(want)
    if enforced is None or inflight.stop.asked:
        enforced = await inflight.unless_stopped(tools.tokens.ensure(want))
    if enforced is None:
        return outcome_of_stop(inflight.stop)
    inflight.hold(enforced.token)
    if (record := enforced.record) is None:
        record = enforced.record = ClaimsRecord.of(enforced.claims, tools.digests)
    record_claims(trail, record, tools.clock.now())
    if tools.store.limits_in_claims:
        await tools.store.note_claims(plan.org.id, enforced.claims)
    return enforced


def _claims(
    claims: Claims, inflight: InflightRun, plan: AttemptPlan, trail: Trail, tools: Tools
) -> outcomes.Gated | None:
    """Enforces the claims again, then flag and variant. Raises TokenRefused."""
    definition = plan.definition
    properties = definition.requires_properties
    # `ensure` has compared the client, which it alone knows.
    enforce(claims, org_code=plan.org.code, client_id=None, scopes=inflight.scopes, properties=properties)
    tools.pool_rules.enforce(inflight.run.pool, claims)
    flag = definition.requires_flag
    if flag is not None and not flag_is(claims, flag.name, flag.equals):
        return outcomes.Gated("flag_off", flag.name)
    for variant in definition.variants_of(inflight.run.origin):
        if flag_is(claims, variant.flag.name, variant.flag.equals):
            trail.handler = variant.handler
            break
    return None


async def _version(
    stored: StoredProgress,
    claims: Claims,
    inflight: InflightRun,
    plan: AttemptPlan,
    trail: Trail,
    tools: Tools,
) -> None:
    """Take the version that a rollout gives the run at its first start, and that it keeps.

    A variant goes first that a flag has chosen now, or that has stored progress.
    """
    run, rollout = inflight.run, plan.rollout_of(inflight.run)
    if rollout is None or tools.versions is None or trail.handler != run.handler:
        return
    if stored.handler not in (None, rollout.old, rollout.new):
        return
    flag = rollout.flag
    flag_on = flag is None or flag_is(claims, flag.name, flag.equals)
    given = run.id, run.fencing_token, run.attempt, run.origin, run.org_id, rollout.id, flag_on
    version = await tools.versions.keep_version(VersionAsk(*given, stored.handler))
    if version is None:
        raise LeaseLost(f"run {run.id} is no longer ours")
    trail.handler = version.handler


def _handler(
    stored: StoredProgress,
    claims: Claims,
    inflight: InflightRun,
    plan: AttemptPlan,
    trail: Trail,
    tools: Tools,
) -> HandlerEntry | outcomes.NoHandler | outcomes.NotApproved | Failed:
    """The handler, whose scopes are enforced too if it is a variant. Raises TokenRefused."""
    run, handlers = inflight.run, tools.handlers
    # A run keeps the handler that first stored progress: another version would not understand it.
    name = trail.handler = stored.handler or trail.handler
    entry = handlers.get(name)
    if entry is None or (run.isolation == "inline" and not handlers.allows_inline(entry)):
        return outcomes.NoHandler(name)
    if name != run.handler:
        if (command := handlers.unapproved(name, plan.definition, is_variant=True)) is not None:
            return outcomes.NotApproved(command)
        inflight.scopes |= frozenset(entry.scopes)
        enforce(claims, org_code=plan.org.code, client_id=None, scopes=inflight.scopes)
    if entry.state and (not plan.definition.serial or run.origin == "child"):
        return state_without_order(plan, name, is_child=run.origin == "child")
    if run.isolation == "inline" and not plan.network.seals_inline:
        unsealed = cannot_be_sealed(name, plan.network.egress(plan.definition, entry))
        return entry if unsealed is None else unsealed
    return entry


async def _secrets(
    entry: HandlerEntry, inflight: InflightRun, plan: AttemptPlan, tools: Tools
) -> OrgSecrets | outcomes.Refused:
    """The secrets that the handler declares. A bound one is of no use without a broker that sends it."""
    secrets = await tools.secrets.of(plan.org, entry.secrets)
    inflight.hold_secrets({name: each.value for name, each in secrets.items()})
    if lacking := [name for name in entry.secrets if name not in secrets]:
        message = f"org {plan.org.code} has no secret {lacking[0]}, which {entry.name} declares"
        return outcomes.Refused(SECRET_MISSING, lacking[0], message)
    bound = [name for name, each in secrets.items() if each.binding is not None]
    if bound and not tools.brokered:
        message = f"the secret {bound[0]} of org {plan.org.code} is bound, and {NO_BROKER}"
        return outcomes.Refused(SECRET_BOUND, bound[0], message)
    return secrets


async def _budgets(run: AdmittedRun, tools: Tools) -> tuple[BudgetState, ...]:
    """The budgets of the org. Raises TokenRefused without a property that one of them needs."""
    found = await tools.store.budgets_of(run)
    if found.missing is not None:
        raise TokenRefused("property_missing", found.missing)
    return tuple(found.states)


async def run_handler(
    prepared: Prepared, inflight: InflightRun, trail: Trail, tools: HandlerTools
) -> Outcome:
    """The handler: in its own process, or inline if the operator allows it."""
    if inflight.stop.killed:
        # Its lease was lost as it was prepared: an inline handler would act before it is cancelled.
        return LEASE_LOST
    limits, work = prepared.limits, prepared.work
    given = inflight, trail, tools.acts, tools.run_log, tools.clock, work.checkpoint
    running = Running(*given, spans=SpanRoom.of(work.traces))
    tools.deadlines.add(inflight.stop, limits.timeout, limits.cancel_grace)
    try:
        outcome = await tools.runners[inflight.run.isolation].run(work, running, inflight.stop)
    finally:
        tools.deadlines.discard(inflight.stop)
    if running.refused is not None:
        raise running.refused
    return outcome if prepared.commits else without_state(outcome)


def without_state(outcome: Outcome) -> Outcome:
    """The outcome of an attempt that must not change the definition's state, whatever its process sent."""
    if isinstance(outcome, Succeeded) and outcome.state is not None:
        return Succeeded(outcome.result)
    return outcome


def outcome_of_error(error: Exception, inflight: InflightRun, random: Random) -> Outcome:
    """The outcome of an attempt that raised; reports an error of the worker itself."""
    match error:
        case TokenRefused():
            return outcomes.Refused(error.reason, error.detail, error.message)
        case StoreUnavailable() | LeaseLost():
            return outcomes.HandedBack(error.code)
        case TokenError() | Unavailable() | ConfigurationError():
            return outcomes.NoToken(pause_after(error, random), f"{error.code}: {error.message}")
        case WorkerError():
            return Failed(Error(type(error).__name__, error.message), permanent=True)
    kind, org, run = type(error).__name__, inflight.org_code, inflight.run
    emit("loop.failed", loop="attempt", error=f"{kind}: {error}", org=org, run=run.id, attempt=run.attempt)
    return Failed(Error(kind, "the worker itself failed at this run"))


async def conclude(inflight: InflightRun, outcome: Outcome, trail: Trail, tools: Tools) -> EndedAttempt:
    """What is written for an attempt that has just ended, with all of its texts masked."""
    run, limits = inflight.run, limits_of(inflight, tools)
    if isinstance(outcome, outcomes.Refused) and outcome.reason not in NOT_OF_TOKENS:
        await outdate_token(inflight, tools)
    if inflight.moved:
        # Recoveries are counted from the last checkpoint that moved.
        run = replace(run, recoveries=0)
    await mask_trail(trail, run.org_id)
    ended = end_attempt(
        run,
        await redacted(_within_parent(run, outcome), run.org_id),
        trail,
        limits.retry,
        now=tools.clock.now(),
        random=tools.random,
        # It would wait for children that its own slot keeps from starting.
        parked_counts=limits.parked_counts and not inflight.children,
    )
    ended.has_children = bool(inflight.children)
    return ended


def _within_parent(run: AdmittedRun, outcome: Outcome) -> Outcome:
    """The outcome of a child, whose result its parent reads: failed if that is too large."""
    if run.origin != "child" or not isinstance(outcome, Succeeded) or outcome.result is None:
        return outcome
    if (size := len(outcome.result.encode())) <= MAX_CHILD_RESULT:
        return outcome
    message = (
        f"the result of a child is {size / 1024:.1f} KiB of JSON; the maximum is "
        f"{MAX_CHILD_RESULT // 1024} KiB: store it elsewhere and return where"
    )
    return Failed(Error("NotStorable", message), reason="result_invalid")


async def outdate_token(inflight: InflightRun, tools: Tools) -> None:
    """Have the org's next run ask for another token: the claims of this one may have been corrected."""
    if (plan := inflight.plan) is not None:
        with suppress(WorkerError):
            await tools.tokens.outdate(plan.want(limits_of(inflight, tools), tools.handlers))


def limits_of(inflight: InflightRun, tools: Tools) -> Limits:
    """The limits of an attempt; the default ones if its definition could not be read."""
    if inflight.plan is None:
        return DEFAULT_LIMITS
    handler = inflight.run.handler
    return inflight.plan.limits(handler, tools.handlers.get(handler))


def pause_after(error: WorkerError, random: Random) -> timedelta:
    """How long a run without a token waits: as its issuer says, at most `LONGEST_PAUSE`, plus jitter."""
    seconds = getattr(error, "retry_after", None) or PAUSE
    return timedelta(seconds=min(float(seconds), LONGEST_PAUSE) * random.uniform(1.0, 1.2))
