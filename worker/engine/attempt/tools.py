"""Tools: what all attempts of a process share.

`StoreActs` does what running handlers ask for, in the stores of the worker or of a trial.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Protocol

from worker.clock import Clock
from worker.engine.attempt.answers import Acts, Running
from worker.engine.attempt.inflight import Deadlines, InflightRun, trace_step
from worker.engine.attempt.plan import AttemptPlan, HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.runners.contract import Runner
from worker.errors import LeaseLost, Unavailable
from worker.guard.claims import Claims
from worker.guard.decode import enforce
from worker.handlers.calls import (
    A,
    AskBudgets,
    AskLimits,
    AskShare,
    AskToken,
    Call,
    CountSpend,
    KnownLimits,
    LoadSteps,
    OpenWait,
    PauseOrigin,
    ReadChildren,
    ReadEnded,
    Save,
    StartChildren,
    StepTotals,
    StoreStep,
    TraceStep,
)
from worker.ids import OrgId, RunId
from worker.model.batches import ModelApi
from worker.model.bindings import OrgSecrets
from worker.model.claims import Digests, Enforced, PoolRules
from worker.model.limits import Share
from worker.model.orgs import OrgRef, TokenWant
from worker.model.prices import ModelUsage
from worker.model.rollouts.rollout import RunVersion, VersionAsk
from worker.model.runs.budgets import OrgBudgets
from worker.model.runs.children import ChildPage, FamilyCap, NewChild, PlacedChild, Span
from worker.model.runs.run import AdmittedRun, Isolation, LoadedState, RunStep, StepPage, StoredProgress
from worker.model.runs.waits import NewWait, WaitState
from worker.secret import AccessToken


class StepStore(Protocol):
    async def store_step(self, step: RunStep) -> bool:
        """Store a step, fenced and durable; returns whether the run was still ours."""


class TokenSource(Protocol):
    def at_hand(self, want: TokenWant) -> Enforced | None:
        """What `ensure` would return at once and without any request, else None. Raises TokenError."""

    async def ensure(self, want: TokenWant) -> Enforced:
        """A verified and enforced token with some life left.

        Raises TokenRefused if the issuer's token must not be used, TokenError and Unavailable if there is
        no token, or no verdict on it, for now.
        """

    async def outdate(self, want: TokenWant) -> None:
        """Request a new token for the next run: the claims of this one were refused."""

    async def load(self, orgs: Sequence[OrgRef]) -> Collection[OrgId]:
        """Read what `ensure` needs of these orgs in one query; what cannot be read is left to `ensure`.

        Returns the orgs that are new to this process.
        """

    async def look_up(self, wanted: Sequence[TokenWant]) -> None:
        """Read the tokens that other processes stored for these in one query, as far as possible."""


class SecretSource(Protocol):
    async def of(self, org: OrgRef, names: Collection[str]) -> OrgSecrets:
        """The org's secrets with these names as they are now, without those that it lacks.

        Raises Unavailable, and ConfigurationError if the key ring does not open one.
        """


class LimitSource(Protocol):
    """Limits of calls to other services, by origin, which all workers share."""

    async def limits_of(self, org_id: OrgId, origin: str) -> KnownLimits:
        """The limits of an origin, and for how long it pauses the org. Raises Unavailable."""

    async def share_of(self, org_id: OrgId, call: AskShare, *, host: str | None) -> Share:
        """A share of a limit; its ends are in seconds from now. Raises Unavailable.

        `host` is the incarnation of the host whose broker asks; None for the worker's own.
        """

    async def pause_origin(self, org: OrgRef, origin: str, seconds: float) -> None:
        """Let the requests of an org to an origin wait, on all workers. Raises Unavailable."""

    async def close(self) -> None:
        """End the questions that are under way."""

    async def run(self) -> None:
        """A loop that learns of the pauses of other workers, until cancelled. Raises Unavailable."""


class NoLimits:
    """For workers without the feature, and trials."""

    async def limits_of(self, org_id: OrgId, origin: str) -> KnownLimits:
        return KnownLimits()

    async def share_of(self, org_id: OrgId, call: AskShare, *, host: str | None) -> Share:
        raise Unavailable("there are no limits")

    async def pause_origin(self, org: OrgRef, origin: str, seconds: float) -> None:
        return

    async def close(self) -> None:
        return

    async def run(self) -> None:
        await asyncio.Event().wait()


class Batches(Protocol):
    """Model requests that are sent in batches, for all workers of a pool."""

    @property
    def apis(self) -> tuple[ModelApi, ...]:
        """Those of `[batches]`."""

    def serves(self, pool: str) -> bool:
        """Whether this worker sends batches for runs of a pool."""

    async def open(self, inflight: InflightRun, wait: NewWait) -> WaitState | None:
        """Store a request of a run, fenced, and say how it stands; None if the run is no longer ours.

        `over`: the run sends it on its own. `answered`: its result is the answer. Raises Unavailable.
        """

    async def run(self) -> None:
        """A loop that sends batches and stores their results, until cancelled. Raises Unavailable."""

    async def close(self) -> None:
        """Close its connections."""


class NoBatches:
    """For workers without the feature, and trials."""

    def __init__(self, apis: tuple[ModelApi, ...] = ()) -> None:
        self.apis = apis

    def serves(self, pool: str) -> bool:
        return False

    async def open(self, inflight: InflightRun, wait: NewWait) -> WaitState | None:
        return WaitState("batch", "over")

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class GivenSecrets:
    """The secrets of a trial, whatever its org."""

    values: OrgSecrets = field(default_factory=dict, repr=False)

    async def of(self, org: OrgRef, names: Collection[str]) -> OrgSecrets:
        return {name: self.values[name] for name in names if name in self.values}


class AttemptStore(Protocol):
    """What running attempts store and read, but for steps."""

    async def save_checkpoint(self, run: AdmittedRun, handler: str, data_json: str, number: int = 0) -> bool:
        """Store a run's checkpoint, fenced; returns whether the run was still ours.

        `number` counts the saves of the attempt: a request that arrives late overwrites no later save.
        """

    async def load_steps(self, run_id: RunId, after: int) -> StepPage:
        """The stored steps of a run after the place `after`."""

    async def step_totals(self, run_id: RunId) -> tuple[int, int]:
        """The last place of a run's steps, and the bytes of their results."""

    async def open_wait(self, run: AdmittedRun, wait: NewWait) -> WaitState | None:
        """Store what a run waits for, fenced, and return how that stands; None if it was no longer ours."""

    async def start_children(
        self,
        run: AdmittedRun,
        children: Sequence[NewChild],
        *,
        cap: FamilyCap,
        keep: bool,
        isolations: Mapping[str, Isolation],
    ) -> Sequence[PlacedChild] | None:
        """Store children of a run, fenced, each in the isolation of its handler; None if it was not ours.

        Raises StepError at a limit, and Unavailable if the run is being cancelled.
        """

    async def read_children(self, run_id: RunId, places: Sequence[int]) -> ChildPage:
        """Children of a run by their places."""

    async def read_ended(self, run: AdmittedRun, spans: Sequence[Span], after: int) -> ChildPage | None:
        """The next children of these spans that have ended, fenced; None if the run was no longer ours."""

    async def cap_of(self, run: AdmittedRun) -> FamilyCap | None:
        """What the parent of a child allows it; None if its row is gone."""

    async def budgets_of(self, run: AdmittedRun) -> OrgBudgets:
        """The budgets of a run's org now."""

    async def spend(
        self, run: AdmittedRun, meter: str, amount: int, key: str, used: ModelUsage | None = None
    ) -> OrgBudgets | None:
        """Count a spend, fenced, once for each key; None if the run is no longer ours."""

    async def load_progress(self, run_id: RunId) -> StoredProgress:
        """The newest checkpoint, and the handler that stored the first checkpoint or step."""

    async def load_state(self, run: AdmittedRun) -> LoadedState:
        """The state of the run's definition."""

    def is_limited(self, org_id: OrgId) -> bool:
        """Whether an org has a budget that its runs check before steps and spends."""

    @property
    def limits_in_claims(self) -> bool:
        """Whether a budget takes its limit from the tokens."""

    async def note_claims(self, org_id: OrgId, claims: Claims) -> None:
        """Store the limits of budgets that an enforced token has."""


class VersionStore(Protocol):
    async def keep_version(self, ask: VersionAsk) -> RunVersion | None:
        """The version of a run that starts, stored with it, fenced; None if the run is no longer ours."""

    async def kept_version(self, run_id: RunId) -> str | None:
        """The handler that a run has got by a rollout, or None."""


class HandlerTools(Protocol):
    """What all attempts of a worker or of a host share, to run handlers."""

    @property
    def acts(self) -> Acts: ...
    @property
    def run_log(self) -> RunLogWriter: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def runners(self) -> Mapping[Isolation, Runner]: ...
    @property
    def deadlines(self) -> Deadlines: ...
    async def prepare(self, runs: Sequence[AdmittedRun]) -> None:
        """Read what the attempts of these runs need, so that they need not wait one by one."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all attempts of this process share; `brokered` if it has a broker, which sends bound secrets."""

    plans: Plans
    tokens: TokenSource
    handlers: HandlerRegistry
    runners: Mapping[Isolation, Runner]
    store: AttemptStore
    steps: StepStore
    run_log: RunLogWriter
    clock: Clock
    random: Random
    digests: Digests | None = None
    pool_rules: PoolRules = field(default_factory=PoolRules)
    secrets: SecretSource = field(default_factory=GivenSecrets)
    brokered: bool = True
    deadlines: Deadlines = field(default_factory=Deadlines)
    limits: LimitSource = field(default_factory=NoLimits)
    batches: Batches = field(default_factory=NoBatches)
    # None in a trial, which has no rollouts.
    versions: VersionStore | None = None

    async def prepare(self, runs: Sequence[AdmittedRun]) -> None:
        """Read what the attempts of these runs need in few queries, so that they need not wait one by one."""
        plans = await self.plans.load(runs)
        unknown = await self.tokens.load([plan.org for plan in plans])
        if unknown:
            # A restart: what other processes stored is not in this one's memory.
            await self.tokens.look_up([self._want(plan) for plan in plans if plan.org.id in unknown])

    @property
    def acts(self) -> StoreActs:
        return StoreActs(self)

    def _want(self, plan: AttemptPlan) -> TokenWant:
        handler = plan.definition.handler
        return plan.want(plan.limits(handler, self.handlers.get(handler)), self.handlers)

    async def renew(self, inflight: InflightRun, call: AskToken) -> tuple[AccessToken, Claims]:
        """A token of a running attempt with some life left, enforced, as it asks for it.

        One for another audience or resource has no scopes: those of the definition are of its own audience.

        Raises TokenRefused, and TokenError and Unavailable as `TokenSource.ensure`.
        """
        plan = inflight.plan
        if plan is None:
            raise LeaseLost(f"run {inflight.run.id} has not started")
        definition, org = plan.definition, plan.org
        other = call.audience or call.resource
        scopes = frozenset() if other else inflight.scopes
        enforced = await self.tokens.ensure(
            TokenWant(
                org,
                plan.issuer,
                other or definition.audience,
                scopes,
                max_age=definition.max_claims_age,
                fresh=call.fresh,
                resource=bool(call.resource),
            )
        )
        inflight.hold(enforced.token)
        enforce(enforced.claims, org_code=org.code, client_id=None, scopes=scopes)
        self.pool_rules.enforce(inflight.run.pool, enforced.claims)
        if self.store.limits_in_claims and not other:
            await self.store.note_claims(org.id, enforced.claims)
        return enforced.token, enforced.claims


@dataclass(frozen=True, slots=True)
class StoreActs:
    """Does what handlers ask in stores: of a worker, or of a trial."""

    tools: Tools
    reports_denials: ClassVar[bool] = True

    async def act(self, call: Call[A], of: Running) -> A:
        """As `Acts.act`."""
        given: A = await self._act(call, of)
        return given

    async def _act(self, call: Call[Any], of: Running) -> Any:
        tools, store, run = self.tools, self.tools.store, of.run
        match call:
            case StoreStep():
                if not await tools.steps.store_step(row_of(call, of)):
                    raise _lost(of)
                return None
            case Save(data, number):
                if not await store.save_checkpoint(run, of.trail.handler, data, number):
                    raise _lost(of)
                return None
            case OpenWait(wait) if wait.kind == "batch":
                if (state := await tools.batches.open(of.inflight, wait)) is None:
                    raise _lost(of)
                return state
            case OpenWait(wait):
                if (state := await store.open_wait(run, wait)) is None:
                    raise _lost(of)
                return state
            case StartChildren(children, keep):
                return await self._start(children, keep, of)
            case ReadChildren(places):
                return await store.read_children(run.id, places)
            case ReadEnded(spans, after):
                if (page := await store.read_ended(run, spans, after)) is None:
                    raise _lost(of)
                return page
            case CountSpend(meter, amount, key, used):
                if (budgets := await store.spend(run, meter, amount, key, used)) is None:
                    raise _lost(of)
                return budgets
            case AskBudgets():
                return await store.budgets_of(run)
            case AskToken():
                return await tools.renew(of.inflight, call)
            case AskLimits(origin):
                return await tools.limits.limits_of(run.org_id, origin)
            case AskShare():
                return await tools.limits.share_of(run.org_id, call, host=of.host)
            case PauseOrigin(origin, seconds):
                org = OrgRef(run.org_id, of.inflight.org_code or "")
                return await tools.limits.pause_origin(org, origin, seconds)
            case LoadSteps(after):
                return await store.load_steps(run.id, after)
            case StepTotals():
                return await store.step_totals(run.id)
            case TraceStep(span):
                return trace_step(span, of.inflight)
        raise TypeError(f"no store does what {call.way.name} asks")

    async def _start(self, children: Sequence[NewChild], keep: bool, of: Running) -> Sequence[PlacedChild]:
        inflight, run, handlers = of.inflight, of.run, self.tools.handlers
        if inflight.plan is None or inflight.cap is None:
            raise LeaseLost(f"run {run.id} has not started")
        # A definition may keep all of its runs out of the worker's process, but bring none in.
        apart = inflight.plan.definition.isolation == "child"
        isolations: dict[str, Isolation] = {
            name: "child" if apart else handlers.declared(name).isolation_in(run.pool)
            for name in {child.handler for child in children}
        }
        placed = await self.tools.store.start_children(
            run, children, cap=inflight.cap, keep=keep, isolations=isolations
        )
        if placed is None:
            raise _lost(of)
        return tuple(placed)


def row_of(call: StoreStep, of: Running) -> RunStep:
    """The row of an admitted step."""
    return RunStep(of.run, of.trail.handler, call.step, len(call.step.result_json.encode()))


def _lost(of: Running) -> LeaseLost:
    whose = "this host's" if of.hosted else "ours"
    return LeaseLost(f"run {of.run.id} is no longer {whose}")
