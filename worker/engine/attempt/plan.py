"""Plan: what an attempt needs to know of its definition and org, cached; and the limits it runs under.

The handler registry has the handlers that this worker can run, as its catalogue children report them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal, Protocol, Self

from worker.bounded import Sized
from worker.clock import Clock
from worker.engine.runners.contract import Work
from worker.errors import ConfigurationError, DefinitionError, Unavailable
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId
from worker.model.bindings import OrgSecrets, bound_secrets, given_texts
from worker.model.claims import Enforced
from worker.model.definitions import CANCEL_GRACE, TIMEOUT, RetryPolicy
from worker.model.definitions.definition import Definition, from_spec
from worker.model.definitions.origins import check_base_url, check_encrypted, is_listed
from worker.model.definitions.units import parse_duration, parse_memory
from worker.model.egress import API, Egress, Owner, effective
from worker.model.orgs import OrgRef, TokenWant
from worker.model.rollouts.rollout import Rollout, RolloutBook
from worker.model.runs.children import FamilyCap
from worker.model.runs.outcome import Error, Failed
from worker.model.runs.run import AdmittedRun, Declared, LoadedState, RunContext, StoredProgress
from worker.telemetry.tracing import detail, traceparent

ANYWHERE = Declared()
Network = Literal["auto", "require", "open"]


class HandlerRegistry:
    """Handlers by name, without broken ones and without inline ones that the operator does not allow."""

    def __init__(self, inline: frozenset[str] = frozenset()) -> None:
        self._inline = inline
        self._entries: dict[str, HandlerEntry] = {}
        # Of the handlers here, and of those of all workers and hosts.
        self._own: dict[str, Declared] = {}
        self._declared: Mapping[str, Declared] = {}

    def add(self, entry: HandlerEntry) -> bool:
        """Add an entry of the catalogue; returns whether it is offered."""
        if entry.error is not None:
            return False
        if entry.isolation == "inline" and not self.allows_inline(entry):
            return False
        self._entries[entry.name] = entry
        self._own[entry.name] = Declared("inline" if entry.isolation == "inline" else "child", entry.pool)
        return True

    def get(self, name: str) -> HandlerEntry | None:
        return self._entries.get(name)

    def unapproved(self, name: str, definition: Definition, *, is_variant: bool = False) -> str | None:
        """The command that approves a handler, if a run of this definition may not be of it until then."""
        return None

    def allows_inline(self, entry: HandlerEntry) -> bool:
        """Whether the operator allows this entry's distribution in the worker's process."""
        return entry.distribution in self._inline

    def learn(self, declared: Mapping[str, Declared]) -> None:
        """Take what handlers of all workers and hosts declare, for those that are not offered here."""
        self._declared = declared

    def declared(self, name: str) -> Declared:
        """Where a handler asks to run: as it is installed here, else as another worker or host offers it."""
        return self._own.get(name) or self._declared.get(name, ANYWHERE)

    def scopes(self, handlers: Sequence[str]) -> frozenset[str]:
        if not handlers:
            return frozenset()
        entries = (self._entries.get(name) for name in handlers)
        return frozenset(scope for entry in entries if entry is not None for scope in entry.scopes)

    def secrets(self, handlers: Sequence[str]) -> frozenset[str]:
        """The names of all secrets that these handlers get."""
        entries = (self._entries.get(name) for name in handlers)
        return frozenset(name for entry in entries if entry is not None for name in entry.secrets)

    def limits(self) -> Mapping[str, int | None]:
        """The limit of each offered handler over all workers, or None."""
        return {name: entry.max_concurrent for name, entry in self._entries.items()}

    def names(self) -> Sequence[str]:
        return sorted(self._entries)


# Seconds that a plan is cached: an org's new name or issuer takes effect within that time.
MAX_AGE = 5.0
MAX_PLANS = 10_000
# Bytes of what plans share; of one about so many, and so many for each character of its spec.
SHARED_BYTES = 32 * 1024 * 1024
SHARED_SIZE = 3_000
SIZE_OF_SPEC = 6


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one attempt; `memory` is in bytes, `scopes` are those that its token must have."""

    timeout: timedelta = TIMEOUT
    cancel_grace: timedelta = CANCEL_GRACE
    memory: int | None = None
    scopes: frozenset[str] = frozenset()
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    parked_counts: bool = False

    @classmethod
    def of(cls, definition: Definition, entry: HandlerEntry | None) -> Self:
        """The limits of a definition; `entry` is None if its handler is not offered here."""
        timeout = memory = attempts = None
        scopes: frozenset[str] = frozenset()
        if entry is not None:
            timeout = parse_duration(entry.timeout) if entry.timeout else None
            memory = parse_memory(entry.memory) if entry.memory else None
            attempts, scopes = entry.max_attempts, frozenset(entry.scopes)
        return cls(
            timeout=definition.timeout_or(timeout),
            cancel_grace=definition.cancel_grace,
            memory=definition.memory or memory,
            scopes=scopes if definition.scopes is None else definition.scopes,
            retry=definition.retry_policy(attempts),
            parked_counts=definition.parked_counts,
        )


# For an attempt that could not read its definition.
DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """What the operator says of the network of runs: `[execution] network`, and `egress` as a cap.

    With `seals_inline`, inline runs may list something too: in a test, where only their clients are bound.
    """

    network: Network = "auto"
    cap: tuple[str, ...] | None = None
    seals_inline: bool = False

    def egress(self, definition: Definition, entry: HandlerEntry) -> Egress:
        """What an attempt of this handler may reach, and the audiences for which it may ask for a token."""
        lists: Mapping[Owner, tuple[str, ...]] = {}
        if self.network != "open":
            required = self.network == "require"
            lists = effective(entry.egress, definition.egress, self.cap, required=required)
        audiences = entry.audiences if definition.audiences is None else definition.audiences
        if entry.audiences:
            audiences = tuple(one for one in audiences if one in entry.audiences)
        return Egress(tuple(lists.values()), definition.reveal_token, audiences, tuple(lists))

    def of_host(self, egress: Egress) -> Egress:
        """What a host with this policy makes of the egress that its worker decided; it has no cap."""
        if self.network == "open":
            return replace(egress, lists=(), owners=())
        if self.network == "require" and not egress.lists:
            return replace(egress, lists=((API,),), owners=("handler",))
        return egress


AUTO = NetworkPolicy()


# Not frozen: where each run is of another org, each has a plan of its own.
@dataclass(slots=True)
class AttemptPlan:
    """The definition at the run's revision, the org it acts for, and the origins its token may go to.

    `definition.org` is empty: all orgs whose definitions have this name and spec share it.
    """

    definition: Definition
    org: OrgRef
    org_name: str
    issuer: str
    api_origins: tuple[str, ...]
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()
    api_base_url: str = ""
    network: NetworkPolicy = AUTO
    org_timezone: str | None = None
    rollout: Rollout | None = None
    _limits: dict[str, tuple[HandlerEntry | None, Limits]] = field(default_factory=dict, repr=False)
    _want: TokenWant | None = field(default=None, repr=False)

    def limits(self, handler: str, entry: HandlerEntry | None) -> Limits:
        """The limits of an attempt by this handler, cached for all runs of the plan."""
        cached = self._limits.get(handler)
        if cached is None or cached[0] is not entry:
            cached = self._limits[handler] = (entry, Limits.of(self.definition, entry))
        return cached[1]

    def variants(self, origin: str = "schedule") -> tuple[str, ...]:
        """The handlers besides its own that a flag may choose for a run; a child has none."""
        return tuple(variant.handler for variant in self.definition.variants_of(origin))

    def rollout_of(self, run: AdmittedRun) -> Rollout | None:
        """The rollout that decides the version of a run; None for a child, which has its parent's."""
        rollout = self.rollout
        is_one = rollout is not None and run.origin != "child" and run.handler == rollout.old
        return rollout if is_one else None

    def others(self, origin: str = "schedule") -> tuple[str, ...]:
        """As `variants`, with the handler that a rollout may choose."""
        variants = self.variants(origin)
        return variants if self.rollout is None or origin == "child" else (*variants, self.rollout.new)

    def want(self, limits: Limits, handlers: HandlerRegistry) -> TokenWant:
        """The token of an attempt, which may have the scopes of its other handlers too."""
        definition, want = self.definition, self._want
        # Cached unless the scopes change with the handlers that are offered.
        if want is None or want.scopes is not limits.scopes or definition.variants or self.rollout:
            also_ask = handlers.scopes(self.others())
            asked = (self.org, self.issuer, definition.audience, limits.scopes, also_ask)
            want = self._want = TokenWant(*asked, max_age=definition.max_claims_age)
        return want

    def work(
        self,
        run: AdmittedRun,
        entry: HandlerEntry,
        enforced: Enforced,
        stored: StoredProgress,
        state: LoadedState | None,
        secrets: OrgSecrets,
        limits: Limits,
        *,
        now: datetime,
        parent_trace: str | None = None,
    ) -> Work:
        """The work of a run for the handler `entry`, which starts now."""
        place = traceparent(run.id, run.fencing_token, parent_trace)
        return Work(
            run_id=run.id,
            attempt=run.attempt,
            fencing_token=run.fencing_token,
            idempotency_key=run.idempotency_key,
            scheduled_for=run.scheduled_for,
            org_code=self.org.code,
            org_name=self.org_name,
            handler=entry.name,
            entry_point=entry.entry_point,
            params={**(self.definition.params if run.origin != "child" else {}), **(run.params or {})},
            claims=enforced.claims,
            token=enforced.token,
            api_origins=self.api_origins,
            timeout_at=now + limits.timeout,
            checkpoint=stored.checkpoint,
            memory=limits.memory,
            traceparent=place,
            traces=detail(place),
            private_origins=self.private_origins,
            insecure_origins=self.insecure_origins,
            replays=run.may_have_checkpoint,
            state=None if state is None else state.value,
            api_base_url=self.api_base_url,
            meter_usage=self.definition.meter_usage,
            secrets=given_texts(run.id, secrets),
            bound=bound_secrets(run.id, secrets),
            egress=self.network.egress(self.definition, entry),
        )

    def cap(self, entry: HandlerEntry, limits: Limits) -> FamilyCap:
        """What the runs may have that a run of this handler starts: no more than it has itself."""
        egress = self.network.egress(self.definition, entry)
        scopes, secrets = limits.scopes, frozenset(entry.secrets)
        return FamilyCap(entry.name, scopes, secrets, egress.lists, frozenset(egress.audiences))


def cannot_be_sealed(handler: str, egress: Egress) -> Failed | None:
    """The outcome of an inline run whose egress is not open: it would run in this process. None if it is."""
    if egress.is_open:
        return None
    message = (
        f"{handler} runs inline, in a process that cannot be sealed, and its egress is not open: set "
        'isolation = "child", or declare egress=["open"] in @job if [execution] egress allows it'
    )
    return Failed(Error("ConfigurationError", message), permanent=True)


def state_without_order(plan: AttemptPlan, handler: str, *, is_child: bool = False) -> Failed:
    """The outcome if runs of a definition could overwrite each other's state: an older definition."""
    fix = "start a handler without state" if is_child else "choose skip, queue_one or replace"
    message = (
        f"definition {plan.org.code}/{plan.definition.name}, overlap: {handler} declares state, which "
        f"concurrent runs would overwrite; {fix}"
    )
    return Failed(Error("DefinitionError", message), permanent=True)


class PlanStore(Protocol):
    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        """The org and the definition's revision of a run, in one query."""

    async def orgs_and_definitions(self, wanted: Sequence[Revision]) -> Mapping[Revision, RunContext]:
        """The same of several revisions, without those that are gone."""


Revision = tuple[DefinitionId, int]


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the plans of all orgs with the same definition share."""

    definition: Definition
    api_origins: tuple[str, ...]
    api_base_url: str
    size: int
    limits: dict[str, tuple[HandlerEntry | None, Limits]] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class Plans:
    """Cached plans by definition and revision. A definition's `api_origins` replace those of its issuer."""

    store: PlanStore
    clock: Clock
    api_origins: Mapping[str, tuple[str, ...]]
    private_origins: tuple[str, ...] = ()
    insecure_origins: tuple[str, ...] = ()
    api_base_urls: Mapping[str, str] = field(default_factory=dict)
    network: NetworkPolicy = AUTO
    rollouts: RolloutBook = field(default_factory=RolloutBook)
    _plans: OrderedDict[Revision, tuple[float, AttemptPlan]] = field(default_factory=OrderedDict)
    # By issuer, name and spec: a template's definitions differ in their org only.
    _shared: Sized[tuple[str, str, str], _Shared] = field(
        default_factory=lambda: Sized(SHARED_BYTES, lambda shared: shared.size)
    )

    async def of(self, run: AdmittedRun) -> AttemptPlan:
        """The plan of a run. Raises DefinitionError if this version does not understand the stored spec,
        ConfigurationError if its token would go to a forbidden origin, and Unavailable.
        """
        key = (run.definition_id, run.revision)
        cached = self._plans.get(key)
        if cached is not None and self.clock.monotonic() - cached[0] < MAX_AGE:
            return cached[1]
        plan = self._plan_of(await self.store.org_and_definition(run))
        self._keep({key: plan})
        return plan

    async def load(self, runs: Sequence[AdmittedRun]) -> list[AttemptPlan]:
        """The plans of these runs, read in one query; without those that cannot be read now."""
        oldest = self.clock.monotonic() - MAX_AGE
        plans: list[AttemptPlan] = []
        missing: set[Revision] = set()
        for run in runs:
            key = (run.definition_id, run.revision)
            cached = self._plans.get(key)
            if cached is not None and cached[0] > oldest:
                plans.append(cached[1])
            else:
                missing.add(key)
        if missing:
            # `of` meets the same error again, and reports it for its run.
            with suppress(Unavailable):
                contexts = await self.store.orgs_and_definitions(sorted(missing))
                found: dict[Revision, AttemptPlan] = {}
                for key, context in contexts.items():
                    with suppress(DefinitionError, ConfigurationError):
                        found[key] = self._plan_of(context)
                self._keep(found)
                plans.extend(found.values())
        return plans

    def _plan_of(self, context: RunContext) -> AttemptPlan:
        """The plan of a context; raises as `of`."""
        shared = self._shared_of(context)
        definition = shared.definition
        return AttemptPlan(
            definition=definition,
            org=OrgRef(context.org_id, context.org_code),
            org_name=context.org_name,
            issuer=context.issuer,
            api_origins=shared.api_origins,
            private_origins=self.private_origins,
            insecure_origins=self.insecure_origins,
            api_base_url=shared.api_base_url,
            network=self.network,
            org_timezone=context.org_timezone,
            rollout=self.rollouts.find(
                definition.name, definition.handler, tags_json=context.tags, issuer=context.issuer
            ),
            _limits=shared.limits,
        )

    def _keep(self, plans: Mapping[Revision, AttemptPlan]) -> None:
        now = self.clock.monotonic()
        for key, plan in plans.items():
            self._plans[key] = (now, plan)
            self._plans.move_to_end(key)
        # The oldest are first, and of no use once they are too old.
        while len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        while self._plans and now - next(iter(self._plans.values()))[0] >= MAX_AGE:
            self._plans.popitem(last=False)

    def _shared_of(self, context: RunContext) -> _Shared:
        key = (context.issuer, context.definition_name, context.spec)
        shared = self._shared.get(key)
        if shared is not None:
            return shared
        definition = from_spec(context.org_code, context.definition_name, json.loads(context.spec))
        origins = definition.api_origins
        if origins is None:
            origins = self.api_origins.get(context.issuer, ())
        try:
            entry = f"definition {definition.org}/{definition.name}"
            check_encrypted(origins, self.insecure_origins, entry=entry)
            check_base_url(definition.api_base_url, origins, entry=entry)
        except DefinitionError as error:
            # Stored before the rule existed, or no longer allowed: the run waits for the operator.
            raise ConfigurationError(f"{error.message}; {error.fix}") from error
        base_url = definition.api_base_url
        if base_url is None:
            base_url = self.api_base_urls.get(context.issuer, "")
            if base_url and not is_listed(base_url, origins):
                base_url = ""  # the definition has other origins
        size = SHARED_SIZE + SIZE_OF_SPEC * len(context.spec)
        shared = _Shared(replace(definition, org=""), origins, base_url, size)
        self._shared.put(key, shared)
        return shared
