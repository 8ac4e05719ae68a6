"""`ctx.spend` and `ctx.budget`: count what a run spends, and stop at a budget's limit.

A run is stopped before its next new step or its next spend outside of steps. It is never stopped before a
step that returns its stored result.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from worker.clock import Clock
from worker.handlers.calls import AskBudgets, CountSpend, Port
from worker.handlers.results import RateLimited
from worker.handlers.steps import NAME_LIMIT, StepError, check_name, open_step
from worker.handlers.waits import AnyWaits
from worker.model.definitions.budgets import MAX_AMOUNT, RESERVED_METERS, amount_text
from worker.model.prices import KINDS, Kind, ModelUsage, model_name
from worker.model.runs.budgets import MAX_SPENDS, BudgetState, decisive, tightest, wait_of
from worker.model.runs.waits import BUDGET, LIMIT, NewWait

# Waits of a run for one meter, or for one service, before it gives up.
MAX_WAITS = 1000

States = Sequence[BudgetState]


class BudgetExceeded(Exception):
    """A budget is used up and does not allow more: the run fails, without a retry."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend of a meter: the tightest of its org's budgets."""

    limit: int | None
    """The limit in the period, with raises; None without a budget."""
    used: int
    """What of it is used; 0 without a budget."""
    left: int | None
    """What may be spent until then; None without a budget."""
    resets_at: datetime | None
    """When the period ends; aware, in UTC. None without a budget, or for a budget per run."""

    @classmethod
    def of(cls, states: States, meter: str) -> Budget:
        found = tightest(states, meter)
        if found is None:
            return cls(None, 0, None, None)
        return cls(found.limit, found.used, found.left, found.resets_at)


class KnownBudget(Awaitable[Budget]):
    """A budget as the worker said last; await it to ask again."""

    def __init__(self, known: Budget, ask: Callable[[], Coroutine[Any, Any, Budget]]) -> None:
        self.limit, self.used, self.left = known.limit, known.used, known.left
        self.resets_at = known.resets_at
        self._ask = ask

    def __await__(self) -> Generator[Any, None, Budget]:
        return self._ask().__await__()


_NO_BRACKETS = str.maketrans("", "", "[]")


class _Done(Awaitable[None]):
    """Nothing to wait for: a spend inside a step is stored with the step."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


DONE = _Done()


class Spending:
    """The spends of a run; for a handler that blocks nothing here suspends.

    `known` are the newest budgets of the org; None for an org without any.
    """

    def __init__(self, port: Port, waits: AnyWaits, known: States | None, attempt: int, clock: Clock) -> None:
        self._port = port
        self._waits = waits
        self._known = known
        self._attempt = attempt
        self._clock = clock
        self._lock = threading.Lock()
        self._number = 0
        self._waited: dict[str, int] = {}

    def spend(
        self,
        meter: str,
        amount: int | Mapping[Kind, int],
        model: str | None = None,
        provider: str | None = None,
        kind: Kind | None = None,
    ) -> Coroutine[Any, Any, None] | None:
        """As `Context.spend`. None inside a step: it is noted, and there is nothing to wait for."""
        if check_name("meter", meter) in RESERVED_METERS:
            raise StepError(f"spend {meter}: orgworker counts this meter itself; use another name")
        used = _usage(meter, amount, model, provider, kind)
        number = _amount(meter, amount if used is None else used.amount)
        return None if self._in_step(meter, number, used) else self._spent(meter, number, used)

    async def _spent(self, meter: str, amount: int, used: ModelUsage | None) -> None:
        """Count a spend, unless a budget stops the run before it."""
        while (state := await self.reached()) is not None:
            await self.stop(state)
        await self.count(meter, amount, used)

    async def count(self, meter: str, amount: int, used: ModelUsage | None = None) -> None:
        """Count what was spent already, without a stop before it."""
        if not self._in_step(meter, amount, used):
            spend = CountSpend(meter, amount, f"{self._attempt}:{self._next_number()}", used)
            self._learn((await self._port.ask(spend)).states)

    def _in_step(self, meter: str, amount: int, used: ModelUsage | None) -> bool:
        """Note the spend with the open step, if there is one; it is stored with the step's result."""
        step = open_step()
        if step is not None:
            step.spends.append((meter, amount))
            if used is not None:
                step.used.append(used)
        return step is not None

    def _next_number(self) -> int:
        with self._lock:
            if self._number >= MAX_SPENDS:
                raise StepError(
                    f"spend: the attempt has {MAX_SPENDS:,} spends outside of steps, the limit; "
                    "add them up, or spend inside steps"
                )
            self._number += 1
            return self._number

    def budget(self, meter: str) -> KnownBudget:
        """As `Context.budget`."""
        check_name("meter", meter)
        return KnownBudget(Budget.of(self._known or (), meter), partial(self.now, meter))

    async def now(self, meter: str) -> Budget:
        """The budget of a meter as it is now."""
        check_name("meter", meter)
        return Budget.of(await self._states(), meter)

    async def reached(self) -> BudgetState | None:
        """The budget that stops the run now, or None."""
        return decisive(await self._states())

    async def _states(self) -> States:
        return () if self._known is None else self._learn((await self._port.ask(AskBudgets())).states)

    def _learn(self, states: States) -> States:
        if self._known is not None or states:
            self._known = states
        return states

    async def stop(self, state: BudgetState) -> None:
        """Stop at this budget: park until it may have changed.

        Raises BudgetExceeded if it does not let the run wait, or an operator did not raise it.
        """
        if state.at_limit == "fail":
            raise BudgetExceeded(f"{in_words(state)}; an operator can raise it: `budgets raise`")
        occurrence = self._waited.get(f"{BUDGET}{state.meter}", 0) + 1
        if occurrence > MAX_WAITS:
            raise BudgetExceeded(f"{in_words(state)}, and the run has waited for it {MAX_WAITS} times")
        wait = wait_of(state, occurrence, self._clock.now())
        found = await self._waits.park(wait)
        self._waited[wait.name] = wait.occurrence
        if found.answer_json is not None and json.loads(found.answer_json) is False:
            raise BudgetExceeded(f"{in_words(state)}; an operator did not raise it")

    async def wait_for(self, limited: RateLimited) -> None:
        """Park until a limit of a service has room again; raises `limited` if the run did so too often."""
        # An address in brackets is not a name.
        name = f"{LIMIT}{limited.origin}".translate(_NO_BRACKETS)[:NAME_LIMIT]
        occurrence = self._waited.get(name, 0) + 1
        if occurrence > MAX_WAITS:
            raise limited
        await self._waits.park(NewWait(name, occurrence, "sleep", limited.retry_after))
        self._waited[name] = occurrence


def in_words(state: BudgetState) -> str:
    """A budget that is used up, for people."""
    used, limit = (amount_text(state.meter, amount) for amount in (state.used, state.limit))
    return f"the budget of {state.meter} per {state.per} is used up: {used} of {limit}"


def _amount(meter: str, amount: Any) -> int:
    """The amount of a spend; raises StepError."""
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 <= amount <= MAX_AMOUNT:
        raise StepError(
            f"spend {meter}: the amount is a whole number from 0 to {MAX_AMOUNT:,}, "
            f"not {str(amount)[:40]}; count smaller units instead of fractions"
        )
    return amount


def _usage(meter: str, amount: Any, model: Any, provider: Any, kind: Any) -> ModelUsage | None:
    """What the model of a spend used; None for a spend without a model. Raises StepError."""
    if model is None:
        if kind is not None or provider is not None or isinstance(amount, Mapping):
            raise StepError(f'spend {meter}: kinds and a provider belong to a model: pass model="gpt-5-mini"')
        return None
    if isinstance(amount, Mapping) == (kind is not None):
        raise StepError(
            f'spend {meter}: pass a number and its kind, kind="input", '
            'or the numbers of one request by kind, {"input": 1200, "output": 80}'
        )
    by_kind = amount if kind is None else {kind: amount}
    for name in by_kind:
        if name not in KINDS:
            raise StepError(f"spend {meter}: {name!r:.60} is not a kind; use {', '.join(KINDS)}")
    try:
        named = None if provider is None else model_name(provider)
        kinds = tuple((name, _amount(meter, units)) for name, units in by_kind.items())
        return ModelUsage(named, model_name(model), kinds)
    except ValueError as error:
        raise StepError(f"spend {meter}: {error}") from None
