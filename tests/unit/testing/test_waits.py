"""Waits in a test: answers that it gives, and time that passes at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from worker import BlockingContext, Context, WaitTimeout, job
from worker.errors import UsageError
from worker.testing import Crash, Orgworker


@pytest.fixture
def orgworker() -> Orgworker:
    return Orgworker()


calls: list[str] = []


@job("acme.publish")
async def publish(ctx: Context[Any, Any]) -> dict[str, Any]:
    draft = await ctx.step("draft", lambda: calls.append("draft") or "text")
    await ctx.sleep("2d")
    try:
        answer = await ctx.wait_for("approval", timeout="3d", ask={"publish": draft})
    except WaitTimeout:
        return {"approved": None}
    return {"approved": answer, "times": len(calls)}


@job("acme.publish_blocking")
def publish_blocking(ctx: BlockingContext[Any, Any]) -> Any:
    ctx.sleep("1h")
    return ctx.wait_for("approval")


def test_an_answer_is_given_and_a_sleep_takes_no_time(orgworker: Orgworker) -> None:
    calls.clear()
    began = orgworker.clock.now()

    run = orgworker.run(publish, answers={"approval": {"by": "kim"}})

    assert run.result == {"approved": {"by": "kim"}, "times": 1}
    assert [attempt.outcome for attempt in run.attempts] == ["parked", "parked", "succeeded"]
    assert orgworker.clock.now() - began >= timedelta(days=2)
    assert [(wait.name, wait.kind, wait.answered, wait.timed_out) for wait in run.waits] == [
        ("sleep", "sleep", False, True),
        ("approval", "answer", True, False),
    ]
    assert run.waits[1].ask == {"publish": "text"}


def test_without_an_answer_the_wait_times_out(orgworker: Orgworker) -> None:
    began = orgworker.clock.now()

    assert orgworker.run(publish).result == {"approved": None}
    assert orgworker.clock.now() - began >= timedelta(days=5)


def test_without_an_answer_and_a_deadline_the_run_stays_waiting(orgworker: Orgworker) -> None:
    run = orgworker.run(publish_blocking)

    assert (run.state, run.reason, run.detail) == ("waiting", "answer", "approval")


def test_a_crash_after_the_step_repeats_nothing(orgworker: Orgworker) -> None:
    calls.clear()

    run = orgworker.run(publish, answers={"approval": True}, faults=[Crash(after_step=1)])

    assert run.result == {"approved": True, "times": 1}
    assert [attempt.outcome for attempt in run.attempts] == ["lost", "parked", "parked", "succeeded"]


@pytest.mark.parametrize("place", ["here", "child"])
def test_a_blocking_handler_goes_on_too(orgworker: Orgworker, place: Any) -> None:
    assert orgworker.run(publish_blocking, answers={"approval": 7}, place=place).result == 7


@job("acme.bound")
async def bound(ctx: Context[Any, Any]) -> Any:
    return await ctx.wait_for("approval", options=["yes", "no"])


@pytest.mark.parametrize("place", ["here", "child"])
def test_an_answer_is_one_of_the_options(orgworker: Orgworker, place: Any) -> None:
    run = orgworker.run(bound, answers={"approval": "no"}, place=place)

    assert (run.result, run.waits[0].options) == ("no", ("yes", "no"))


def test_an_answer_that_is_no_option_fails_the_test(orgworker: Orgworker) -> None:
    """The control: the same answer to a wait without options."""
    with pytest.raises(UsageError, match="the answer to approval is not one of its options") as refused:
        orgworker.run(bound, answers={"approval": "maybe"})

    assert refused.value.fix == 'give "yes", "no"'
    run = orgworker.run(publish_blocking, answers={"approval": "maybe"})
    assert (run.result, run.waits[1].options) == ("maybe", None)


def test_a_misspelt_answer_fails_the_test_if_the_run_waits_forever(orgworker: Orgworker) -> None:
    """The controls: an answer to something else, and one to a wait that was there before."""
    with pytest.raises(UsageError, match="waits for approval, and there is an answer to aproval") as refused:
        orgworker.run(publish_blocking, answers={"aproval": 1})

    assert refused.value.fix == "did you mean approval?"
    assert orgworker.run(publish_blocking, answers={"release": 1, "approval#2": 1}).state == "waiting"
