"""Trial: one run of one handler through the real attempt, with fake tokens and nothing stored."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import cached_property
from random import SystemRandom
from typing import Any, Literal
from zoneinfo import ZoneInfo

from worker.clock import Clock
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import AUTO, HandlerRegistry, NetworkPolicy, Plans
from worker.engine.attempt.run_log import Progress, RunLogWriter
from worker.engine.attempt.tools import Batches, GivenSecrets, NoBatches, SecretSource, TokenSource, Tools
from worker.engine.runners.contract import Runner, StopSignal
from worker.engine.trial_children import Family, TrialChildren
from worker.errors import UsageError
from worker.guard import profile
from worker.guard.claims import Claims
from worker.guard.decode import decode
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId, OrgId, RunId, new_id
from worker.model.claims import Enforced
from worker.model.definitions.budgets import (
    MONEY,
    BudgetEntry,
    limit_in,
    parse_budget,
    period_of,
    property_key,
)
from worker.model.definitions.definition import Definition, parse_definition, to_spec
from worker.model.orgs import OrgRef, TokenWant
from worker.model.prices import ModelUsage, Prices
from worker.model.runs.budgets import BudgetState, OrgBudgets
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import (
    AdmittedRun,
    Isolation,
    LoadedState,
    LogLine,
    Origin,
    RunContext,
    RunStep,
    StepPage,
    StoredProgress,
    StoredStep,
    step_label,
)
from worker.model.runs.waits import NewWait, WaitState, is_option
from worker.model.search import hint_of
from worker.telemetry.masking import masker

LIFETIME = timedelta(hours=1)
# A token with less life left is not returned.
MARGIN = timedelta(seconds=30)
_UTC = ZoneInfo("UTC")


@dataclass(eq=False, repr=False)
class FakeTokens:
    """A `TokenSource` without an issuer; grants the requested scopes, or the given ones."""

    clock: Clock
    properties: Mapping[str, Any] | None = None
    flags: Mapping[str, Any] | None = None
    scopes: Iterable[str] | None = None
    lifetime: timedelta = LIFETIME
    _newest: Enforced | None = None

    async def ensure(self, want: TokenWant) -> Enforced:
        """The newest token while it is fresh enough, or a new one. Raises TokenRefused: impossible claims."""
        newest, now = self._newest, self.clock.now()
        if newest is not None and not want.fresh:
            old = want.max_age is not None and now - newest.claims.issued_at >= want.max_age
            if not old and newest.token.expires_at - now > min(MARGIN, self.lifetime / 5):
                return newest
        self._newest = newest = self.mint(want.org, want.scopes | want.also_ask)
        return newest

    async def outdate(self, want: TokenWant) -> None:
        """Mint a new token for the next run."""
        self._newest = None

    def at_hand(self, want: TokenWant) -> Enforced | None:
        """None: `ensure` decides."""
        return None

    async def load(self, orgs: Sequence[OrgRef]) -> Collection[OrgId]:
        return ()

    async def look_up(self, wanted: Sequence[TokenWant]) -> None: ...

    def mint(self, org: OrgRef, scopes: frozenset[str]) -> Enforced:
        """A token that only a test's own API accepts."""
        issued_at = self.clock.now()
        granted = scopes if self.scopes is None else set(self.scopes)
        payload = {
            "iss": "https://made-up.invalid",
            "azp": "made-up-client",
            "org_code": org.code,
            "scope": " ".join(sorted(granted)),
            "application_properties": {name: {"v": value} for name, value in (self.properties or {}).items()},
            "feature_flags": {
                name: {"t": _flag_type(value), "v": value} for name, value in (self.flags or {}).items()
            },
            "iat": issued_at.timestamp(),
            "exp": (issued_at + self.lifetime).timestamp(),
        }
        claims = decode(payload, profile.load("kinde"))
        text = f"made-up.{secrets.token_urlsafe(32)}"
        # As for a real token, so that a handler that prints it sees it masked.
        masker.register(text, org.id)
        return Enforced.of(text, claims, self.clock)


def _flag_type(value: Any) -> str:
    if isinstance(value, bool):
        return "b"
    return "s" if isinstance(value, str) else "i"


def definition_of(org: str, handler: str, keys: Mapping[str, Any]) -> Definition:
    """The definition of a trial's run; `keys` are as in a file for `apply`. Raises DefinitionError."""
    # The schedule is required, but never used.
    values = {"org": org, "name": "trial", "handler": handler, "schedule": "@hourly", **keys}
    return parse_definition(values, entry="definition")


def budgets_of(org: str, given: Mapping[str, Any]) -> list[BudgetEntry]:
    """Budgets by meter: a limit in a run, at which it fails, or keys as in a file for `apply`.

    Raises:
        DefinitionError: an invalid budget.
    """
    entries = []
    for meter, value in given.items():
        keys = {"limit": value, "per": "run", "at_limit": "fail"} if isinstance(value, int) else dict(value)
        entries.append(parse_budget({"org": org, "meter": meter, **keys}, f"budget {meter}"))
    return entries


@dataclass(eq=False, repr=False)
class TrialBudgets:
    """What a worker's store does with budgets, for the one run of a trial."""

    clock: Clock
    entries: Sequence[BudgetEntry] = ()
    _spends: dict[tuple[str, str], tuple[datetime, int]] = field(default_factory=dict)
    _claims: Claims | None = None

    @property
    def spent(self) -> dict[str, int]:
        """What the run has spent, by meter."""
        total: Counter[str] = Counter()
        for (meter, _), (_, amount) in self._spends.items():
            total[meter] += amount
        return dict(total)

    def count(self, step: RunStep) -> None:
        """Count the spends of a step that was stored."""
        amounts: Counter[str] = Counter()
        for meter, amount in step.step.spends:
            amounts[meter] += amount
        for meter, amount in amounts.items():
            self._count(meter, amount, f"step:{step.step.seq}")
        self._cost(step.step.used, f"step:{step.step.seq}")

    def is_limited(self, org_id: OrgId) -> bool:
        return bool(self.entries)

    @property
    def limits_in_claims(self) -> bool:
        return True

    async def note_claims(self, org_id: OrgId, claims: Claims) -> None:
        self._claims = claims

    async def budgets_of(self, run: AdmittedRun) -> OrgBudgets:
        now, states, missing = self.clock.now(), [], None
        spent = self.spent
        for entry in self.entries:
            limit = entry.limit
            if entry.property_name is not None and self._claims is not None:
                limit = limit_in(self._claims.properties, property_key(entry.meter, entry.property_name))
            uses = entry.meter in spent
            if limit is None:
                missing = entry.property_name if uses else missing
                continue
            period = None
            if entry.per != "run":
                period = period_of(entry.per, ZoneInfo(entry.zone) if entry.zone else _UTC, now)
            start = datetime.min.replace(tzinfo=UTC) if period is None else period.start
            used = sum(
                amount
                for (meter, _), (at, amount) in self._spends.items()
                if meter == entry.meter and at >= start
            )
            resets_at = None if period is None else period.end
            states.append(
                BudgetState(entry.meter, entry.per, limit, used, resets_at, entry.at_limit, uses=uses)
            )
        return OrgBudgets(states, missing)

    async def spend(
        self, run: AdmittedRun, meter: str, amount: int, key: str, used: ModelUsage | None = None
    ) -> OrgBudgets | None:
        self._count(meter, amount, key)
        self._cost([] if used is None else [used], key)
        return await self.budgets_of(run)

    def _cost(self, used: Sequence[ModelUsage], key: str) -> None:
        """Count what these uses of models cost by the prices of the release."""
        if not used:
            return
        priced = [self._prices.price(each, at=self.clock.now()).money for each in used]
        if known := [money for money in priced if money is not None]:
            self._count(MONEY, sum(known), key)

    @cached_property
    def _prices(self) -> Prices:
        from worker.model.price_list import GenaiPrices

        return Prices(GenaiPrices.released(), per_usd=Fraction(1))

    def _count(self, meter: str, amount: int, key: str) -> None:
        self._spends.setdefault((meter, key), (self.clock.now(), amount))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a trial runs, and for which org."""

    org: OrgRef
    org_name: str
    definition: Definition
    issuer: str = "made-up"
    api_origins: tuple[str, ...] = ()
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()
    api_base_url: str = ""
    network: NetworkPolicy = AUTO


@dataclass(slots=True)
class TrialWait:
    """A wait of a trial's run; `attempt` is the last one that opened it."""

    wait: NewWait
    until: datetime | None
    attempt: int = 0
    is_answered: bool = False
    is_over: bool = False
    answer_json: str | None = None

    @property
    def is_open(self) -> bool:
        return not (self.is_answered or self.is_over)

    def deadline(self) -> datetime:
        """When it is over without an answer; the end of time without a deadline."""
        return self.until or datetime.max.replace(tzinfo=UTC)


def _first_run(
    subject: Subject,
    isolation: Isolation,
    now: datetime,
    *,
    continues: bool,
    params: Mapping[str, Any] | None,
) -> AdmittedRun:
    """The first attempt of a manual run, or of one that continues another and so has a checkpoint to load.

    With `params` it is that of a child.
    """
    origin: Origin = "manual" if params is None else "child"
    run_id = RunId(new_id())
    return AdmittedRun(
        id=run_id,
        org_id=subject.org.id,
        definition_id=DefinitionId(new_id()),
        revision=1,
        handler=subject.definition.handler,
        isolation=isolation,
        origin="retry" if continues else origin,
        scheduled_for=now,
        available_at=now,
        start_by=None,
        started_at=now,
        attempt=1,
        failures=0,
        recoveries=0,
        fencing_token=1,
        idempotency_key=run_id,
        params=params,
    )


def _handlers(entries: Sequence[HandlerEntry]) -> HandlerRegistry:
    handlers = HandlerRegistry(frozenset(entry.distribution for entry in entries))
    for entry in entries:
        handlers.add(entry)
    return handlers


class Trial(TrialBudgets, TrialChildren):
    """A run; each call of `attempt` makes its next attempt.

    `on_line` and `on_progress` get what the run logs and shows, masked: within half a second if `live`,
    else at the end of an attempt. `on_saved` is awaited after each checkpoint is stored, `on_step` after
    each step. `family` runs its children; with `params` it is a child itself. `batches` take its model
    requests, if its definition has `model_requests = "batch"`.
    """

    def __init__(
        self,
        subject: Subject,
        entries: Iterable[HandlerEntry],
        tokens: TokenSource,
        runner: Runner,
        clock: Clock,
        *,
        checkpoint: Any = None,
        state: Mapping[str, Any] | None = None,
        isolation: Isolation = "child",
        live: bool = False,
        on_line: Callable[[LogLine], None] = lambda line: None,
        on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None,
        on_saved: Callable[[Trial], Awaitable[None]] | None = None,
        on_step: Callable[[Trial], Awaitable[None]] | None = None,
        answers: Mapping[str, Any] | None = None,
        budgets: Mapping[str, Any] | None = None,
        secrets: SecretSource | None = None,
        brokered: bool = True,
        family: Family | None = None,
        params: Mapping[str, Any] | None = None,
        batches: Batches | None = None,
    ) -> None:
        TrialBudgets.__init__(self, clock, budgets_of(subject.org.code, budgets or {}))
        TrialChildren.__init__(self, family or Family())
        self._subject = subject
        self._live = live
        self._on_line = on_line
        self._on_progress = on_progress
        self._on_saved = on_saved
        self._on_step = on_step
        self.steps: list[RunStep] = []
        # The handler that first stored progress.
        self._kept: str | None = None
        self.waits: dict[tuple[str, int], TrialWait] = {}
        self._answers = dict(answers or {})
        self._checkpoint = None if checkpoint is None else json.dumps(checkpoint)
        # The attempt and number of the last save.
        self._saved = (0, 0)
        self._state = json.dumps(state or {})
        self._run = _first_run(
            subject, isolation, clock.now(), continues=checkpoint is not None, params=params
        )
        self.inflight = InflightRun(self._run, StopSignal())
        self._tools = Tools(
            plans=self._plans(clock),
            tokens=tokens,
            handlers=_handlers(list(entries)),
            runners={isolation: runner},
            store=self,
            steps=self,
            run_log=RunLogWriter(self, clock),
            clock=clock,
            random=SystemRandom(),
            secrets=secrets or GivenSecrets(),
            brokered=brokered,
            batches=batches or NoBatches(),
        )

    def _plans(self, clock: Clock) -> Plans:
        subject = self._subject
        return Plans(
            self,
            clock,
            api_origins={subject.issuer: subject.api_origins},
            private_origins=subject.private_origins,
            insecure_origins=subject.insecure_origins,
            api_base_urls={subject.issuer: subject.api_base_url},
            network=subject.network,
        )

    @property
    def checkpoint(self) -> Any:
        return None if self._checkpoint is None else json.loads(self._checkpoint)

    @property
    def state(self) -> Any:
        """The state of the definition, as its last success left it."""
        return json.loads(self._state)

    async def attempt(self) -> EndedAttempt:
        """Make one attempt. If the run waits after it, the next call makes the next attempt."""
        self.inflight = InflightRun(self._run, StopSignal())
        writing = asyncio.create_task(self._tools.run_log.run()) if self._live else None
        try:
            ended = await attempt(self.inflight, self._tools)
        finally:
            if writing is not None:
                writing.cancel()
            await self._tools.run_log.flush()
        if ended.definition_state is not None:
            self._state = ended.definition_state
        next_at = ended.ended_at + (ended.available_after or timedelta())
        self._run = replace(
            self._run,
            attempt=self._run.attempt + 1,
            fencing_token=self._run.fencing_token + 1,
            failures=ended.failures,
            recoveries=ended.recoveries,
            available_at=next_at,
            started_at=next_at,
        )
        return ended

    def resume(self) -> timedelta | None:
        """Let the parked run go on: give the answers that it waits for, or let the first deadline pass.

        Returns how long that takes; None if it would wait forever, since no answer is given.

        Raises:
            UsageError: an answer is not among the options of its wait, or its name is misspelt.
        """
        now = self._tools.clock.now()
        last = self._run.attempt - 1
        pending = [each for each in self.waits.values() if each.attempt == last and each.is_open]
        answered = False
        for each in pending:
            if each.wait.children is not None and self.children_are_over(each.wait.children):
                answered = True
            key = step_label(each.wait.name, None, each.wait.occurrence)
            if each.wait.kind == "answer" and key in self._answers:
                if each.wait.options and not is_option(each.wait.options, self._answers[key]):
                    options = ", ".join(map(json.dumps, each.wait.options))
                    raise UsageError(f"the answer to {key} is not one of its options", fix=f"give {options}")
                each.answer_json = masker.mask(json.dumps(self._answers[key]), self._subject.org.id)
                answered = each.is_answered = True
        if answered:
            return timedelta()
        first = min(pending, key=TrialWait.deadline, default=None)
        if first is None or first.until is None:
            self._check_names(pending)
            return None
        first.is_over = True
        return max(first.deadline() - now, timedelta())

    def _check_names(self, pending: Sequence[TrialWait]) -> None:
        """Raise UsageError if the run waits forever, and an answer was meant for one of these waits."""
        opened = {step_label(name, None, occurrence) for name, occurrence in self.waits}
        asked = (each.wait for each in pending if each.wait.kind == "answer")
        waited = [step_label(wait.name, None, wait.occurrence) for wait in asked]
        for name in self._answers.keys() - opened:
            if "#" not in name and (hint := hint_of(name, waited)):
                raise UsageError(
                    f"the run waits for {', '.join(waited)}, and there is an answer to {name}",
                    fix=hint.strip(),
                )

    # The stores that an attempt needs.

    async def orgs_and_definitions(
        self, wanted: Sequence[tuple[DefinitionId, int]]
    ) -> Mapping[tuple[DefinitionId, int], RunContext]:
        context = await self.org_and_definition(self._run)
        return dict.fromkeys(wanted, context)

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        subject = self._subject
        return RunContext(
            org_id=subject.org.id,
            org_code=subject.org.code,
            org_name=subject.org_name,
            org_timezone=None,
            issuer=subject.issuer,
            definition_name=subject.definition.name,
            spec=json.dumps(to_spec(subject.definition)),
        )

    async def save_checkpoint(self, run: AdmittedRun, handler: str, data_json: str, number: int = 0) -> bool:
        if self.inflight.stop.killed:
            return False
        save = run.attempt, number
        if save < self._saved:
            return True
        self._saved = save
        self._kept = self._kept or handler
        self._checkpoint = data_json
        if self._on_saved is not None:
            await self._on_saved(self)
        return True

    async def load_progress(self, run_id: RunId) -> StoredProgress:
        return StoredProgress(self.checkpoint, self._kept)

    async def store_step(self, step: RunStep) -> bool:
        if self.inflight.stop.killed:
            return False
        self._kept = self._kept or step.handler
        self.steps.append(step)
        self.count(step)
        if self._on_step is not None:
            await self._on_step(self)
        return True

    async def load_steps(self, run_id: RunId, after: int) -> StepPage:
        stored = (
            StoredStep(each.seq, each.name, each.key, each.occurrence, row.size, each.result_json)
            for row in self.steps
            for each in (row.step,)
        )
        return StepPage([step for step in sorted(stored, key=lambda step: step.seq) if step.seq > after])

    async def step_totals(self, run_id: RunId) -> tuple[int, int]:
        return max((row.step.seq for row in self.steps), default=0), sum(row.size for row in self.steps)

    async def load_state(self, run: AdmittedRun) -> LoadedState:
        return LoadedState(self.state, commits=True)

    async def open_wait(self, run: AdmittedRun, wait: NewWait) -> WaitState | None:
        if self.inflight.stop.killed:
            return None
        now = self._tools.clock.now()
        found = self.waits.get((wait.name, wait.occurrence))
        if found is not None and wait.children is not None:
            # The spans of the newest call count.
            found = self.waits[wait.name, wait.occurrence] = replace(found, wait=wait)
        if found is None:
            until = None if wait.seconds is None else now + timedelta(seconds=wait.seconds)
            found = self.waits[wait.name, wait.occurrence] = TrialWait(wait, until)
        found.attempt = run.attempt
        if not found.is_answered and found.until is not None and found.until <= now:
            found.is_over = True
        if wait.children is not None:
            found.is_over = self.children_are_over(wait.children)
        state: Literal["answered", "over", "pending"] = "over" if found.is_over else "pending"
        if found.is_answered:
            state = "answered"
        return WaitState(found.wait.kind, state, found.answer_json, found.until)

    async def write_progress(self, rows: Sequence[Progress]) -> None:
        for _, _, progress in rows:
            self._on_progress(progress)

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        for line in rows:
            self._on_line(line)
