"""Store acts: what a worker does with the calls of its running handlers, in its stores or a trial's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from worker.errors import LeaseLost
from worker.execution.attempts.answers import Running
from worker.execution.attempts.inflight import InflightRun
from worker.guard.claims import Claims
from worker.handlers.calls import (
    A,
    AskBudgets,
    AskToken,
    Call,
    CountSpend,
    LoadSteps,
    OpenWait,
    Save,
    StepTotals,
    StoreStep,
)
from worker.ids import RunId
from worker.runs.budgets import OrgBudgets
from worker.runs.run import AdmittedRun, RunStep, StepPage
from worker.runs.waits import NewWait, WaitState
from worker.secret import AccessToken


class TokenRenewals(Protocol):
    async def renew(self, inflight: InflightRun, handler: str, *, fresh: bool) -> tuple[AccessToken, Claims]:
        """A token of a running attempt with some life left, enforced; with `fresh` a new one.

        Raises TokenRefused, and TokenError and Unavailable as `TokenSource.ensure`.
        """


class RunStore(Protocol):
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

    async def budgets_of(self, run: AdmittedRun) -> OrgBudgets:
        """The budgets of a run's org now."""

    async def spend(self, run: AdmittedRun, meter: str, amount: int, key: str) -> OrgBudgets | None:
        """Count a spend, fenced, once for each key; None if the run is no longer ours."""


class StepStore(Protocol):
    async def store_step(self, step: RunStep) -> bool:
        """Store a step, fenced and durable; returns whether the run was still ours."""


class RunStores(Protocol):
    """Where the calls of running handlers are stored."""

    @property
    def renewals(self) -> TokenRenewals: ...
    @property
    def store(self) -> RunStore: ...
    @property
    def steps(self) -> StepStore: ...


@dataclass(frozen=True, slots=True)
class StoreActs:
    """Does what handlers ask in stores: of a worker, or of a trial."""

    stores: RunStores

    async def act(self, call: Call[A], of: Running) -> A:
        """As `Acts.act`."""
        given: A = await _ACTS[type(call)](self.stores, call, of)
        return given


_Act = Callable[[RunStores, Any, Running], Awaitable[A]]
_ACTS: dict[object, _Act[Any]] = {}


def _acts(kind: Callable[..., Call[A]]) -> Callable[[_Act[A]], _Act[A]]:
    def declare(act: _Act[A]) -> _Act[A]:
        _ACTS[kind] = act
        return act

    return declare


@_acts(Save)
async def _save(stores: RunStores, call: Save, of: Running) -> None:
    handler = of.trail.handler
    if not await stores.store.save_checkpoint(of.run, handler, call.data, call.number):
        raise _lost(of)


@_acts(AskToken)
async def _token(stores: RunStores, call: AskToken, of: Running) -> tuple[AccessToken, Claims]:
    return await stores.renewals.renew(of.inflight, of.trail.handler, fresh=call.fresh)


@_acts(LoadSteps)
async def _load_steps(stores: RunStores, call: LoadSteps, of: Running) -> StepPage:
    return await stores.store.load_steps(of.run.id, call.after)


@_acts(StepTotals)
async def _step_totals(stores: RunStores, call: StepTotals, of: Running) -> tuple[int, int]:
    return await stores.store.step_totals(of.run.id)


@_acts(StoreStep)
async def _store_step(stores: RunStores, call: StoreStep, of: Running) -> None:
    if not await stores.steps.store_step(row_of(call, of)):
        raise _lost(of)


def row_of(call: StoreStep, of: Running) -> RunStep:
    """The row of an admitted step."""
    return RunStep(of.run, of.trail.handler, call.step, len(call.step.result_json.encode()))


@_acts(OpenWait)
async def _open_wait(stores: RunStores, call: OpenWait, of: Running) -> WaitState:
    state = await stores.store.open_wait(of.run, call.wait)
    if state is None:
        raise _lost(of)
    return state


@_acts(AskBudgets)
async def _budgets(stores: RunStores, call: AskBudgets, of: Running) -> OrgBudgets:
    return await stores.store.budgets_of(of.run)


@_acts(CountSpend)
async def _spend(stores: RunStores, call: CountSpend, of: Running) -> OrgBudgets:
    found = await stores.store.spend(of.run, call.meter, call.amount, call.key)
    if found is None:
        raise _lost(of)
    return found


def _lost(of: Running) -> LeaseLost:
    whose = "this host's" if of.hosted else "ours"
    return LeaseLost(f"run {of.run.id} is no longer {whose}")
