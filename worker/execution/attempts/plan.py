"""Plan: what an attempt must know of its definition and org, cached; and the limits it runs under."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, Self

from worker.clock import Clock
from worker.definitions.definition import Definition, from_spec
from worker.definitions.origins import check_encrypted
from worker.definitions.policies import CANCEL_GRACE, TIMEOUT, RetryPolicy
from worker.definitions.units import parse_duration, parse_memory
from worker.errors import ConfigurationError, DefinitionError
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId
from worker.orgs import OrgRef
from worker.runs.run import AdmittedRun, RunContext


@dataclass(frozen=True, slots=True)
class Terms:
    """Limits of one attempt; `memory` is in bytes, `scopes` are those that its token must have."""

    timeout: timedelta = TIMEOUT
    cancel_grace: timedelta = CANCEL_GRACE
    memory: int | None = None
    scopes: frozenset[str] = frozenset()
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def of(cls, definition: Definition, entry: HandlerEntry | None) -> Self:
        """The terms of a definition whose handler is offered as `entry`, or is not offered here."""
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
        )


# Of an attempt that came to know no definition: one for all, since it never changes.
UNKNOWN = Terms()


# Seconds a plan is kept: an org's new name or issuer is seen that soon.
KEPT = 5.0
BOUND = 10_000


@dataclass(frozen=True, slots=True)
class AttemptPlan:
    """The definition at the run's revision, the org it acts for, and the origins its token may go to."""

    definition: Definition
    org: OrgRef
    org_name: str
    issuer: str
    api_origins: tuple[str, ...]
    _terms: dict[str, tuple[HandlerEntry | None, Terms]] = field(default_factory=dict, repr=False)

    def terms(self, handler: str, entry: HandlerEntry | None) -> Terms:
        """What an attempt by this handler may take; worked out once for all runs of the plan."""
        kept = self._terms.get(handler)
        if kept is None or kept[0] is not entry:
            kept = self._terms[handler] = (entry, Terms.of(self.definition, entry))
        return kept[1]


class PlanStore(Protocol):
    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        """The org and the definition's revision of a run, in one query."""
        ...


class Plans:
    """Plans by definition and revision, the least recently used dropped first.

    `api_origins` are those of each issuer; a definition's replace them. The others are
    `[execution] private_origins` and `insecure_origins`, the same for every run.
    """

    def __init__(
        self,
        store: PlanStore,
        clock: Clock,
        *,
        api_origins: Mapping[str, tuple[str, ...]],
        private_origins: tuple[str, ...] = (),
        insecure_origins: tuple[str, ...] = (),
    ) -> None:
        self._store = store
        self._api_origins = api_origins
        self.private_origins = private_origins
        self.insecure_origins = insecure_origins
        self._clock = clock
        self._plans: OrderedDict[tuple[DefinitionId, int], tuple[float, AttemptPlan]] = OrderedDict()

    async def of(self, run: AdmittedRun) -> AttemptPlan:
        """The plan of a run.

        Raises:
            DefinitionError: the stored spec is not understood by this version.
            ConfigurationError: its token would go unencrypted to an origin that the operator did not allow.
            Unavailable: the database did not answer.
        """
        key = (run.definition_id, run.revision)
        now = self._clock.monotonic()
        kept = self._plans.get(key)
        if kept is not None and now - kept[0] < KEPT:
            self._plans.move_to_end(key)
            return kept[1]
        context = await self._store.org_and_definition(run)
        definition = from_spec(context.org_code, context.definition_name, context.spec)
        named = definition.api_origins
        origins = self._api_origins.get(context.issuer, ()) if named is None else named
        try:
            check_encrypted(
                origins, self.insecure_origins, entry=f"definition {definition.org}/{definition.name}"
            )
        except DefinitionError as error:
            # Stored before the rule, or since allowed no longer: the run waits for the operator.
            raise ConfigurationError(f"{error.message}; {error.fix}") from error
        plan = AttemptPlan(
            definition=definition,
            org=OrgRef(context.org_id, context.org_code),
            org_name=context.org_name,
            issuer=context.issuer,
            api_origins=origins,
        )
        self._plans[key] = (now, plan)
        self._plans.move_to_end(key)
        while len(self._plans) > BOUND:
            self._plans.popitem(last=False)
        return plan
