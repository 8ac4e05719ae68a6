"""Tools: what all attempts of a process share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from worker.claims.enforced import Digests, Enforced, PoolRules
from worker.clock import Clock
from worker.errors import LeaseLost
from worker.execution.attempts.answers import Acts, RunLog
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import Deadlines, InflightRun
from worker.execution.attempts.plan import AttemptPlan, Plans
from worker.execution.attempts.store_acts import RunStore, StepStore, StoreActs, TokenRenewals
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.runners.contract import Runner
from worker.guard.claims import Claims
from worker.guard.decode import enforce
from worker.ids import OrgId, RunId
from worker.orgs import OrgRef, TokenWant
from worker.runs.run import (
    AdmittedRun,
    Isolation,
    LoadedState,
    StoredProgress,
)
from worker.secret import AccessToken


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
    async def of(self, org: OrgRef, names: Collection[str]) -> Mapping[str, str]:
        """The org's secrets with these names as they are now, without those that it lacks.

        Raises Unavailable, and ConfigurationError if the key ring does not open one.
        """


@dataclass(frozen=True, slots=True)
class GivenSecrets:
    """The secrets of a trial, whatever its org."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)

    async def of(self, org: OrgRef, names: Collection[str]) -> Mapping[str, str]:
        return {name: self.values[name] for name in names if name in self.values}


class AttemptStore(RunStore, Protocol):
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


class HandlerTools(Protocol):
    """What it takes to run a handler, of a worker or of a host."""

    @property
    def acts(self) -> Acts: ...
    @property
    def run_log(self) -> RunLog: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def runners(self) -> Mapping[Isolation, Runner]: ...
    @property
    def deadlines(self) -> Deadlines: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What all attempts of this process share."""

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
    deadlines: Deadlines = field(default_factory=Deadlines)

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

    @property
    def renewals(self) -> TokenRenewals:
        return _Renewals(self)

    def _want(self, plan: AttemptPlan) -> TokenWant:
        handler = plan.definition.handler
        return plan.want(plan.limits(handler, self.handlers.get(handler)), self.handlers)


@dataclass(frozen=True, slots=True)
class _Renewals:
    """Renews tokens as attempts first get them: from the cache or the issuer."""

    tools: Tools

    async def renew(self, inflight: InflightRun, handler: str, *, fresh: bool) -> tuple[AccessToken, Claims]:
        plan, tools = inflight.plan, self.tools
        if plan is None:
            raise LeaseLost(f"run {inflight.run.id} has not started")
        definition, org = plan.definition, plan.org
        enforced = await tools.tokens.ensure(
            TokenWant(
                org,
                plan.issuer,
                definition.audience,
                inflight.scopes,
                max_age=definition.max_claims_age,
                fresh=fresh,
            )
        )
        inflight.hold(enforced.token)
        enforce(enforced.claims, org_code=org.code, client_id=None, scopes=inflight.scopes)
        tools.pool_rules.enforce(inflight.run.pool, enforced.claims)
        if tools.store.limits_in_claims:
            await tools.store.note_claims(org.id, enforced.claims)
        return enforced.token, enforced.claims
