"""Claimed: what a run's process or a host says of a step or a wait, as far as its worker believes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime

from worker.handlers.steps import StepError
from worker.handlers.waits import SLEEP
from worker.runs.budgets import BudgetState, decisive, wait_of
from worker.runs.run import AdmittedRun, NewStep
from worker.runs.waits import BUDGET, NewWait


def believed_step(step: NewStep, run: AdmittedRun, now: datetime) -> NewStep:
    """The step with its times within those of its attempt."""
    earliest = min(run.started_at, now)
    ended_at = max(earliest, min(step.ended_at, now))
    return replace(step, started_at=max(earliest, min(step.started_at, ended_at)), ended_at=ended_at)


async def believed_wait(
    wait: NewWait, budgets: Callable[[], Awaitable[Sequence[BudgetState]]], now: Callable[[], datetime]
) -> NewWait:
    """The wait as it may be stored: an operator answers the question of a budget, which is the worker's own.

    `budgets` reads the budgets of the run's org. A wait for one that does not stop the run is over at once:
    the budget may just have been raised.

    Raises:
        StepError: the name is reserved for waits of another kind.
    """
    of_budget = wait.name.startswith(BUDGET)
    if wait.kind == "budget" and of_budget:
        of_meter = [state for state in await budgets() if wait.name == f"{BUDGET}{state.meter}"]
        state = decisive(of_meter)
        if state is None or state.at_limit == "fail":
            return replace(wait, seconds=0.0, ask_json=None, alert=False)
        return wait_of(state, wait.occurrence, now())
    if wait.kind == "budget" or (wait.kind == "answer" and (of_budget or wait.name == SLEEP)):
        raise StepError(f"wait {wait.name}: this name is reserved; use another one")
    return wait


async def masked_wait(wait: NewWait, mask: Callable[[str], Awaitable[str]]) -> NewWait:
    """A wait with what it asks masked. Raises StepError if its name or an option contains a secret."""
    if wait.name != (shown := await mask(wait.name)):
        raise StepError(f"wait {shown}: its name contains a secret; use another")
    # Two masked options would be the same answer.
    for option in wait.options:
        if isinstance(option, str) and option != await mask(option):
            raise StepError(f"wait {wait.name}: an option contains a secret; use another")
    return wait if wait.ask_json is None else replace(wait, ask_json=await mask(wait.ask_json))
