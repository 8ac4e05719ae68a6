"""What becomes of a call of a running handler before anything is done, and after it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.fakes.clock import START, ManualClock, settle
from tests.unit.engine.runs import admitted
from worker.engine.attempt import answers
from worker.engine.attempt.answers import Running, answer
from worker.engine.attempt.inflight import InflightRun
from worker.engine.runners.contract import StopSignal
from worker.errors import LeaseLost, StoreUnavailable, TokenRefused, Unavailable, WorkerError
from worker.handlers.calls import (
    AskBudgets,
    Call,
    CountSpend,
    NotACall,
    OpenWait,
    Save,
    StartChildren,
    StepTotals,
    StoreStep,
)
from worker.handlers.steps import TOTAL_LIMIT, StepError
from worker.model.runs.budgets import OrgBudgets
from worker.model.runs.outcome import Trail
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait, WaitState
from worker.telemetry.mask_in_turn import mask_each


class Acting:
    """`Acts` that answer as scripted, and keep what they did."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.done: list[Call[Any]] = []
        self.answers: dict[type[Call[Any]], Callable[[], Any]] = {
            StepTotals: lambda: (0, 0),
            OpenWait: lambda: WaitState("sleep", "pending"),
            AskBudgets: lambda: OrgBudgets([]),
            CountSpend: lambda: OrgBudgets([]),
        }

    async def act(self, call: Call[Any], of: Running) -> Any:
        self.done.append(call)
        return self.answers.get(type(call), lambda: None)()

    def fail(self, kind: type[Call[Any]], *errors: Exception) -> None:
        left = list(errors)

        def scripted() -> None:
            if left:
                raise left.pop(0)

        self.answers[kind] = scripted


@pytest.fixture
def acts(clock: ManualClock) -> Acting:
    return Acting(clock)


def running(acts: Acting, *, host: str | None = None, **run: Any) -> Running:
    inflight = InflightRun(admitted(**run), StopSignal())
    return Running(inflight, Trail("h"), cast(Any, acts), cast(Any, None), acts.clock, host=host)


def step(seq: int = 1, text: str = "1") -> StoreStep:
    return StoreStep(NewStep("s", None, seq, seq, text, START, START))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "RETRY", 0.0)


async def test_a_call_is_repeated_while_the_database_is_away_but_not_for_a_host(acts: Acting) -> None:
    """A host repeats it itself, at another worker."""
    away = StoreUnavailable("away")
    acts.fail(Save, away, away)
    await answer(Save("1"), running(acts))
    assert len(acts.done) == 3

    acts.fail(Save, away)
    with pytest.raises(StoreUnavailable):
        await answer(Save("1"), running(acts, host="h.1"))
    assert len(acts.done) == 4


async def test_a_run_that_is_cancelled_does_not_wait_to_start_children(acts: Acting) -> None:
    """Its handler would have no time left to end by itself."""
    refused, of = Unavailable("the run is being cancelled"), running(acts)
    acts.fail(StartChildren, *[refused] * 9)
    of.inflight.stop.request("cancel", 10.0)

    with pytest.raises(Unavailable):
        await answer(StartChildren(()), of)

    # The control: what is not stored at a drain waits for the database.
    of.inflight.stop = StopSignal()
    of.inflight.stop.request("drain", 10.0)
    await answer(StartChildren(()), of)
    assert len(acts.done) == 10


@pytest.mark.parametrize("error", [LeaseLost("taken"), TokenRefused("org_mismatch", "secret")])
async def test_what_ends_a_run_kills_it_and_nothing_is_done_after_it(
    acts: Acting, error: WorkerError
) -> None:
    of = running(acts)
    acts.fail(Save, error)

    with pytest.raises(type(error)):
        await answer(Save("1"), of)
    assert of.inflight.stop.killed
    with pytest.raises(LeaseLost):
        await answer(Save("2"), of)

    assert acts.done == [Save("1")]
    of.inflight.stop = StopSignal()  # the control
    await answer(Save("2"), of)
    assert acts.done == [Save("1"), Save("2")]


async def test_an_error_of_a_store_is_one_that_a_handler_knows(
    acts: Acting, caplog: pytest.LogCaptureFixture
) -> None:
    of = running(acts)
    acts.fail(Save, RuntimeError("the row of sk-secret"))

    with pytest.raises(Unavailable, match="RuntimeError") as raised:
        await answer(Save("1"), of)

    assert "sk-secret" not in str(raised.value)
    assert of.errors.no_token is raised.value
    # The operator learns which.
    [record] = caplog.records
    assert record.getMessage() == f"the call save of run {of.run.id} failed"
    assert record.exc_info is not None and record.exc_info[0] is RuntimeError


async def careless(call: Call[Any], of: Running) -> None:
    """As `answer`, with the error in a variable that outlives its `except`."""
    try:
        await answer(call, of)
    except Unavailable as error:
        kept = error
        raise kept from None


@pytest.mark.parametrize("ask", [answer, careless], ids=["", "control"])
async def test_a_flood_of_failing_calls_is_no_work_for_the_garbage_collector(
    acts: Acting, ask: Callable[[Call[Any], Running], Awaitable[None]]
) -> None:
    """A collection stops the worker's loop for 20 ms and more."""
    of = running(acts)
    acts.fail(Save, *[RuntimeError() for _ in range(100)])
    gc.collect()
    gc.disable()

    def unavailable() -> int:
        return sum(type(each) is Unavailable for each in gc.get_objects())

    try:
        before = unavailable()  # of other tests
        for _ in range(100):
            with suppress(Unavailable):
                await ask(Save("1"), of)
        left = unavailable() - before
    finally:
        gc.enable()

    # All but the one that is noted.
    assert left >= 99 if ask is careless else left <= 1


async def test_a_place_may_come_again_from_a_host_only(acts: Acting) -> None:
    of, behind = running(acts), running(acts, host="h.1")
    for each in (of, behind):
        await answer(step(), each)

    with pytest.raises(StepError, match="place 1 is taken"):
        await answer(step(), of)
    await answer(step(), behind)

    assert len([call for call in acts.done if isinstance(call, StoreStep)]) == 3


@pytest.mark.parametrize(("host", "fits"), [(None, 1), ("h.1", 2)])
async def test_one_result_more_fits_if_it_may_be_one_that_was_sent_again(
    acts: Acting, host: str | None, fits: int
) -> None:
    acts.answers[StepTotals] = lambda: (1, TOTAL_LIMIT - 10)
    of = running(acts, host=host, attempt=2)

    for seq in range(2, 2 + fits):
        await answer(step(seq, "1" * 10), of)
    with pytest.raises(StepError, match="64 MiB"):
        await answer(step(2 + fits, "1" * 10), of)


async def test_a_property_that_a_budget_lacks_is_left_to_the_host_of_a_run(acts: Acting) -> None:
    acts.answers[AskBudgets] = lambda: OrgBudgets([], "cap")
    of, behind = running(acts), running(acts, host="h.1")

    with pytest.raises(TokenRefused):
        await answer(AskBudgets(), of)
    assert (await answer(AskBudgets(), behind)).missing == "cap"

    assert [each.refused is not None for each in (of, behind)] == [True, True]
    assert [each.inflight.stop.killed for each in (of, behind)] == [True, False]


async def test_a_spend_of_another_attempt_is_not_a_call(
    acts: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would count as one of an earlier attempt, which counts once."""
    of, spend = running(acts, attempt=2), CountSpend("llm", 1, "1:1")

    with pytest.raises(NotACall):
        await answer(spend, of)
    await answer(replace(spend, key="2:1"), of)
    assert [call for call in acts.done if isinstance(call, CountSpend)] == [replace(spend, key="2:1")]

    monkeypatch.setattr(answers, "check_attempt", lambda spend, of: None)  # the control
    await answer(spend, of)
    assert acts.done[-1] == spend


async def test_all_of_a_call_is_masked_at_once(acts: Acting, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[int] = []

    async def watched(texts: Any) -> list[str]:
        masked.append(len(texts))
        return await mask_each(texts)

    monkeypatch.setattr(answers, "mask_each", watched)
    of = running(acts)
    spends = (("llm", 1), ("tickets", 1))

    await answer(StoreStep(replace(step().step, key="k", spends=spends)), of)
    await answer(OpenWait(NewWait("ok", 1, "answer", ask_json='"?"', options=("yes", "no", 1))), of)
    await answer(AskBudgets(), of)

    assert masked == [5, 4]


@pytest.mark.parametrize("kept", [True, False], ids=["", "control"])
async def test_a_result_is_stored_although_its_handler_is_cancelled(
    acts: Acting, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoreStep, "way", replace(StoreStep.way, kept=kept))
    written, stored = asyncio.Event(), list[StoreStep]()

    async def act(call: Any, of: Running) -> Any:
        await written.wait()
        stored.append(call)

    acts.act = act  # type: ignore[method-assign]
    task = asyncio.create_task(answer(step(), running(acts)))
    await settle()
    task.cancel()
    written.set()
    await settle()

    assert task.cancelled()
    assert len(stored) == kept
