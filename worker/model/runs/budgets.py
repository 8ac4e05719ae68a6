"""Budgets as handler, worker and store exchange them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from worker.clock import to_text
from worker.model.definitions.budgets import MONEY, AtLimit, Per
from worker.model.money import money_text
from worker.model.runs.waits import BUDGET, NewWait

# Spends of an attempt outside of steps, and those noted in one step.
MAX_SPENDS = 100_000
# What is added to the time until a period ends: the clocks of run and database differ a little.
MARGIN = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget of the run's org in its period now.

    `limit` includes raises; `resets_at` is the end of its period, None for a budget per run. `uses` says
    whether this run or an earlier one of its definition has spent of the meter: only then it is stopped.
    """

    meter: str
    per: Per
    limit: int
    used: int
    resets_at: datetime | None
    at_limit: AtLimit
    uses: bool = True

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)

    @property
    def reached(self) -> bool:
        return self.uses and self.used >= self.limit


@dataclass(frozen=True, slots=True)
class OrgBudgets:
    """The budgets of a run's org, and a property that one of them needs and the org's tokens lack."""

    states: Sequence[BudgetState]
    missing: str | None = None


def tightest(states: Iterable[BudgetState], meter: str) -> BudgetState | None:
    """The budget of a meter with the least left; of equal ones, the one that resets last."""
    of_meter = [state for state in states if state.meter == meter]
    return min(of_meter, key=lambda state: (state.left, -_end(state)), default=None)


def decisive(states: Sequence[BudgetState]) -> BudgetState | None:
    """Of the budgets that are reached, the one that decides: one that fails, else one that asks, else the one
    that resets last.
    """
    reached = [state for state in states if state.reached]
    order = ("fail", "ask", "wait")
    return min(reached, key=lambda state: (order.index(state.at_limit), -_end(state)), default=None)


def wait_of(state: BudgetState, occurrence: int, now: datetime) -> NewWait:
    """The wait of a run that this budget stops, with a question if the budget asks."""
    ends_at = state.resets_at
    seconds = None if ends_at is None else max(0.0, (ends_at + MARGIN - now).total_seconds())
    ask = None
    if state.at_limit == "ask":
        resets_at = None if ends_at is None else to_text(ends_at)
        amounts: dict[str, Any] = {"limit": state.limit, "used": state.used}
        if state.meter == MONEY:
            amounts = {name: money_text(amount) for name, amount in amounts.items()}
        ask = json.dumps({"meter": state.meter, "per": state.per, **amounts, "resets_at": resets_at})
    return NewWait(f"{BUDGET}{state.meter}", occurrence, "budget", seconds, ask)


def _end(state: BudgetState) -> float:
    return float("inf") if state.resets_at is None else state.resets_at.timestamp()
