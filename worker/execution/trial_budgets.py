"""Trial budgets: what a trial's run spends, in memory, and the budgets that it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from worker.clock import Clock
from worker.definitions.budgets import BudgetEntry, limit_of_property, parse_budget, period_of
from worker.guard.claims import Claims
from worker.ids import OrgId
from worker.runs.budgets import BudgetState, OrgBudgets
from worker.runs.run import AdmittedRun, RunStep

_UTC = ZoneInfo("UTC")


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
                limit = limit_of_property(self._claims.properties.get(entry.property_name))
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

    async def spend(self, run: AdmittedRun, meter: str, amount: int, key: str) -> OrgBudgets | None:
        self._count(meter, amount, key)
        return await self.budgets_of(run)

    def _count(self, meter: str, amount: int, key: str) -> None:
        self._spends.setdefault((meter, key), (self.clock.now(), amount))
