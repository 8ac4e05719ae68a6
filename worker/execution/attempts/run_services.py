"""Run services: what all attempts share, and what a running handler may ask of the worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from random import Random
from typing import Any, Protocol, TypeVar

from worker.claims.digests import Digests
from worker.claims.enforced import Enforced
from worker.claims.pools import PoolRules
from worker.clock import Clock
from worker.errors import LeaseLost, TokenError, TokenRefused, Unavailable
from worker.execution.attempts.claimed import believed_step, believed_wait
from worker.execution.attempts.handler_registry import HandlerRegistry
from worker.execution.attempts.inflight import Deadlines, InflightRun
from worker.execution.attempts.plan import AttemptPlan, Plans
from worker.execution.loops.run_log_writer import RunLogWriter
from worker.execution.runners.contract import GivenErrors, Runner
from worker.guard.claims import Claims
from worker.guard.decode import enforce
from worker.handlers.steps import TOTAL_FULL, TOTAL_LIMIT, StepError
from worker.ids import OrgId, RunId
from worker.orgs import OrgRef, TokenWant
from worker.runs.budgets import BudgetState
from worker.runs.outcome import Trail
from worker.runs.run import (
    AdmittedRun,
    Isolation,
    LoadedState,
    NewStep,
    RunStep,
    StepPage,
    StoredProgress,
)
from worker.runs.waits import MOST_WAITS, NewWait, WaitState
from worker.secret import AccessToken
from worker.telemetry.mask_in_turn import mask_in_turn

# Seconds between two tries to save a checkpoint, at first and at most.
RETRY_SAVE = 0.1
LONGEST_RETRY_SAVE = 2.0
# Characters of a checkpoint that is parsed to compare it with the last one; that holds the interpreter lock.
COMPARED = 32 * 1024

T = TypeVar("T")


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


class TokenRenewals(Protocol):
    async def renew(self, inflight: InflightRun, handler: str, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token of a running attempt with some life left, enforced; with `fresh` a new one.

        Raises TokenRefused, and TokenError and Unavailable as `TokenSource.ensure`.
        """


class SaveStore(Protocol):
    async def save_checkpoint(self, run: AdmittedRun, handler: str, data_json: str, number: int = 0) -> bool:
        """Store a run's checkpoint, fenced; returns whether the run was still ours.

        `number` counts the saves of the attempt: a request that arrives late overwrites no later save.
        """


class CheckpointStore(SaveStore, Protocol):
    async def load_progress(self, run_id: RunId) -> StoredProgress:
        """The newest checkpoint, and the handler that stored the first checkpoint or step."""

    async def load_state(self, run: AdmittedRun) -> LoadedState:
        """The state of the run's definition."""


class StepStore(Protocol):
    async def load_steps(self, run_id: RunId, after: int) -> StepPage:
        """The stored steps of a run after the place `after`."""

    async def step_totals(self, run_id: RunId) -> tuple[int, int]:
        """The last place of a run's steps, and the bytes of their results."""

    async def store_step(self, step: RunStep) -> bool:
        """Store a step, fenced and durable; returns whether the run was still ours."""


class WaitStore(Protocol):
    async def open_wait(self, run: AdmittedRun, wait: NewWait) -> WaitState | None:
        """Store what a run waits for, fenced, and return how that stands; None if it was no longer ours."""


class FoundBudgets(Protocol):
    """The budgets of a run's org, and a property that one of them needs and the org's tokens lack."""

    @property
    def states(self) -> Sequence[BudgetState]: ...
    @property
    def missing(self) -> str | None: ...


class SpendStore(Protocol):
    async def budgets_of(self, run: AdmittedRun) -> FoundBudgets:
        """The budgets of a run's org now."""

    async def spend(self, run: AdmittedRun, meter: str, amount: int, key: str) -> FoundBudgets | None:
        """Count a spend, fenced, once for each key; None if the run is no longer ours."""


class BudgetStore(SpendStore, Protocol):
    def is_limited(self, org_id: OrgId) -> bool:
        """Whether an org has a budget that its runs check before steps and spends."""

    @property
    def limits_in_claims(self) -> bool:
        """Whether a budget takes its limit from the tokens."""

    async def note_claims(self, org_id: OrgId, claims: Claims) -> None:
        """Store the limits of budgets that an enforced token has."""


class RunTools(Protocol):
    """What the services of a running attempt use: of the worker itself, or of the worker behind a host."""

    @property
    def renewals(self) -> TokenRenewals: ...
    @property
    def checkpoints(self) -> SaveStore: ...
    @property
    def steps(self) -> StepStore: ...
    @property
    def waits(self) -> WaitStore: ...
    @property
    def budgets(self) -> SpendStore: ...
    @property
    def run_log(self) -> RunLogWriter: ...
    @property
    def clock(self) -> Clock: ...


class HandlerTools(RunTools, Protocol):
    """What it takes to run a handler, of a worker or of a host."""

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
    checkpoints: CheckpointStore
    steps: StepStore
    waits: WaitStore
    budgets: BudgetStore
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
        if tools.budgets.limits_in_claims:
            await tools.budgets.note_claims(org.id, enforced.claims)
        return enforced.token, enforced.claims


@dataclass(eq=False, repr=False)
class AttemptServices:
    """The `RunServices` of one attempt; `refused` holds the error of a renewed token that was refused."""

    inflight: InflightRun
    trail: Trail
    checkpoint: Any
    tools: RunTools
    refused: TokenRefused | None = field(default=None, init=False)
    errors: GivenErrors = field(default_factory=GivenErrors, init=False)
    _closed: bool = field(default=False, init=False)
    _saves: int = field(default=0, init=False)
    # Of the run's steps: the places taken in this attempt, the last one before it, and the bytes of all.
    _places: set[int] | None = field(default=None, init=False)
    _totals: tuple[int, int] | None = field(default=None, init=False)
    # The waits in `trail.asks`, with their occurrences.
    _asked: set[tuple[str, int]] = field(default_factory=set, init=False)

    async def save(self, data_json: str) -> None:
        """Store a checkpoint, fenced and durable; wait while the database is away. Raises LeaseLost."""
        run = self.inflight.run
        self._saves = number = self._saves + 1
        masked = await self._mask(data_json)
        self._check_ours(
            await self._when_available(
                lambda: self.tools.checkpoints.save_checkpoint(run, self.trail.handler, masked, number)
            )
        )
        self.inflight.moved = self.inflight.moved or self._differs(data_json)

    def _differs(self, data_json: str) -> bool:
        """Whether a checkpoint is another one than the attempt began with; a large one counts as such."""
        if len(data_json) > COMPARED or self.checkpoint is None:
            return data_json != "null"
        return bool(json.loads(data_json) != self.checkpoint)

    async def load_steps(self, after: int) -> StepPage:
        """The stored steps of earlier attempts; wait while the database is away."""
        run = self.inflight.run
        if not run.may_have_checkpoint:
            return StepPage()
        return await self._when_available(lambda: self.tools.steps.load_steps(run.id, after))

    async def store_step(self, step: NewStep) -> str:
        """Store the result of a step, masked; wait while the database is away.

        Raises:
            StepError: a limit is reached, or the name or key contains a secret.
            LeaseLost: the run is no longer ours.
        """
        run = self.inflight.run
        self._check_open()
        name, key = await self._mask(step.name), step.key and await self._mask(step.key)
        if (step.name, step.key) != (name, key):
            raise StepError(f"step {name}: its name or key contains a secret; use another")
        for meter, _ in step.spends:
            if meter != await self._mask(meter):
                raise StepError(f"spend {await self._mask(meter)}: its name contains a secret; use another")
        if self._places is None:
            self._places = set()
        if self._totals is None:
            totals = (0, 0)
            if run.may_have_checkpoint:
                totals = await self._when_available(lambda: self.tools.steps.step_totals(run.id))
            self._totals = self._totals or totals
        masked = await self._mask(step.result_json)
        self._check_open()
        believed = believed_step(replace(step, result_json=masked), run, self.tools.clock.now())
        row = RunStep(run, self.trail.handler, believed, len(masked.encode()))
        last, size = self._totals
        if step.seq <= last or step.seq in self._places:
            raise StepError(f"step {step.name}: place {step.seq} is taken by another step")
        if size + row.size > TOTAL_LIMIT:
            raise StepError(f"step {step.name}: {TOTAL_FULL}")
        self._places.add(step.seq)
        self._totals = (last, size + row.size)
        # Before it is stored: the process may die first.
        self.inflight.moved = True
        self._check_ours(await self.inflight.store(self.tools.steps.store_step(row)))
        return masked

    async def open_wait(self, wait: NewWait) -> WaitState:
        """Store what the run waits for, masked; wait while the database is away.

        Raises:
            StepError: the name or an option contains a secret, or the name is reserved.
            LeaseLost: the run is no longer ours.
            TokenRefused: as `budgets`, which a wait for a budget asks.
        """
        run = self.inflight.run
        wait = await masked_wait(wait, self._mask)
        wait = await believed_wait(wait, self.budgets, self.tools.clock.now)
        state = await self._when_available(lambda: self.tools.waits.open_wait(run, wait))
        if state is None:
            raise self._lost()
        key = wait.name, wait.occurrence
        # A handler may open a wait as often as it likes; the store limits how many there are.
        if (
            wait.alert
            and state.state == "pending"
            and key not in self._asked
            and len(self._asked) < MOST_WAITS
        ):
            self._asked.add(key)
            self.trail.asks += (wait.name,)
        return state

    async def budgets(self) -> Sequence[BudgetState]:
        """The budgets of the run's org now; wait while the database is away.

        Raises:
            TokenRefused: the org's newest token lacks the limit of a budget; the run ends refused.
        """
        run = self.inflight.run
        return self._allowed(await self._when_available(lambda: self.tools.budgets.budgets_of(run)))

    async def spend(self, meter: str, amount: int, number: int) -> Sequence[BudgetState]:
        """Count a spend of this attempt, fenced and durable; returns the budgets after it.

        Raises:
            StepError: the meter's name contains a secret.
            LeaseLost: the run is no longer ours.
            TokenRefused: as `budgets`.
        """
        run = self.inflight.run
        if meter != await self._mask(meter):
            raise StepError(f"spend {await self._mask(meter)}: its name contains a secret; use another")
        key = f"{run.attempt}:{number}"
        found = await self._when_available(lambda: self.tools.budgets.spend(run, meter, amount, key))
        self._check_ours(found is not None)
        return () if found is None else self._allowed(found)

    async def _mask(self, text: str) -> str:
        return await mask_in_turn(text, self.inflight.run.org_id)

    def _allowed(self, found: FoundBudgets) -> Sequence[BudgetState]:
        if found.missing is not None:
            self.refused = TokenRefused("property_missing", found.missing)
            self.inflight.stop.kill()
            raise TokenRefused("property_missing", found.missing)
        return found.states

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token with some life left; one of another org or without a scope ends the run refused."""
        self._check_open()
        try:
            token, claims = await self.tools.renewals.renew(self.inflight, self.trail.handler, fresh=fresh)
            self.inflight.hold(token)
        except TokenRefused as refused:
            self.refused = refused
            self.inflight.stop.kill()
            # The org can read what its handler logs, so this must not name the other org.
            raise TokenRefused(refused.reason, refused.detail) from None
        except (TokenError, Unavailable) as error:
            self.errors.note(error)
            raise
        return token, claims

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self._check_open()
        # Masked when it is written: a run may report its progress thousands of times a second.
        progress = {"done": done, "total": total, "note": note}
        self.trail.progress = progress
        self.tools.run_log.progress(self.inflight.run, progress)

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self.tools.run_log.line(self.inflight.run, level, source, text, at)

    def started(self) -> None:
        self.trail.handler_started_at = self.tools.clock.now()

    def used(self, peak_memory: int) -> None:
        self.trail.peak_memory = peak_memory

    def close(self) -> None:
        self._closed = True

    async def _when_available(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call of the store, repeated while the database is away. Raises LeaseLost."""
        pause = RETRY_SAVE
        while True:
            self._check_open()
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_RETRY_SAVE)

    def _check_ours(self, stored: bool) -> None:
        if not stored:
            raise self._lost()

    def _lost(self) -> LeaseLost:
        self.inflight.stop.kill()
        lost = LeaseLost(f"run {self.inflight.run.id} is no longer ours")
        self.errors.note(lost)
        return lost

    def _check_open(self) -> None:
        if self._closed:
            raise LeaseLost("the run has ended")


async def masked_wait(wait: NewWait, mask: Callable[[str], Awaitable[str]]) -> NewWait:
    """A wait with what it asks masked. Raises StepError if its name or an option contains a secret."""
    if wait.name != (shown := await mask(wait.name)):
        raise StepError(f"wait {shown}: its name contains a secret; use another")
    # Two masked options would be the same answer.
    for option in wait.options:
        if isinstance(option, str) and option != await mask(option):
            raise StepError(f"wait {wait.name}: an option contains a secret; use another")
    return wait if wait.ask_json is None else replace(wait, ask_json=await mask(wait.ask_json))
