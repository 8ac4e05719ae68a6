"""`RateLimited` in a handler: the run waits, and a step that has sent nothing waits without a process."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock, settle
from tests.unit.handlers.test_context import given
from worker import RateLimited, StepError
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.calling import outcome_of, outcome_of_error
from worker.handlers.calls import OpenWait
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation
from worker.handlers.results import Snooze, limited_by
from worker.handlers.steps import open_step, request_key
from worker.handlers.waits import Parking
from worker.model.limits import MAX_PAUSE
from worker.model.runs.outcome import Failed, Parked, Snoozed
from worker.model.runs.run import NewStep
from worker.model.runs.waits import NewWait, WaitState

ORIGIN = "https://api.example.com"


class Org:
    """The worker's side of a run: its steps, and how its waits stand."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.steps: list[NewStep] = []
        self.waits: list[NewWait] = []
        self.over: set[tuple[str, int]] = set()
        self.parked: list[Parked] = []

    def open_wait(self, wait: NewWait) -> WaitState:
        self.waits.append(wait)
        return WaitState("sleep", "over" if (wait.name, wait.occurrence) in self.over else "pending")

    def given(self) -> Any:
        data = given(self.clock)
        data.replays = True
        return data

    def port(self, *, suspends: bool) -> AnsweringWorker:
        answers = {OpenWait: lambda call: self.open_wait(call.wait)}
        return AnsweringWorker(answers, suspends, steps=self.steps)

    def context(self) -> Context[Any, Any]:
        port = self.port(suspends=True)
        return Context(self.given(), port, Cancellation(), on_park=self.parked.append)

    def blocking(self) -> BlockingContext[Any, Any]:
        port = self.port(suspends=False)
        return BlockingContext(self.given(), port, BlockingCancellation(), on_park=self.parked.append)


class Api:
    """A client in a step: some requests are refused, with the time until there is room."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused
        self.number = 0

    async def request(self) -> int:
        return self.blocking_request()

    def blocking_request(self) -> int:
        self.number += 1
        step = open_step()
        if step is not None:
            request_key("key", step)
        if self.number in self.refused:
            raise RateLimited(20, ORIGIN)
        return self.number


def wrapped() -> RuntimeError:
    """As a client library raises it."""
    try:
        raise RuntimeError("connection error") from RateLimited(7, ORIGIN)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [RateLimited(7, ORIGIN), wrapped()], ids=["itself", "as a cause"])
def test_a_handler_that_lets_it_escape_waits_and_no_attempt_counts(error: Exception):
    outcome = outcome_of_error(error)

    assert isinstance(outcome, Snoozed)
    assert outcome.after == timedelta(seconds=7)
    assert outcome.detail is not None
    assert ORIGIN in outcome.detail


def test_a_time_that_is_too_long_has_a_ceiling():
    assert outcome_of_error(RateLimited(1e9)) == Snoozed(timedelta(seconds=MAX_PAUSE), str(RateLimited(1e9)))


def test_an_error_that_came_while_it_was_handled_is_another_one():
    try:
        try:
            raise RateLimited(7)
        except RateLimited:
            raise ValueError("wrong") from None
    except ValueError as error:
        assert isinstance(outcome_of_error(error), Failed)
        assert limited_by(error) is None


def test_snooze_takes_its_time():
    assert outcome_of(Snooze(RateLimited(12.5).retry_after)) == Snoozed(timedelta(seconds=12.5))


async def test_a_step_parks_before_its_first_request_and_is_called_again(clock: ManualClock):
    org, api = Org(clock), Api(1)
    ctx = org.context()
    attempt = asyncio.create_task(ctx.step("ask", api.request))
    await settle(40)

    assert [(wait.name, wait.kind, wait.seconds) for wait in org.waits] == [(f"limit:{ORIGIN}", "sleep", 20)]
    assert not attempt.done()
    attempt.cancel()

    org.over = {(f"limit:{ORIGIN}", 1)}
    assert await org.context().step("ask", api.request) == 2
    assert len(org.steps) == 1


async def test_the_next_attempt_parks_again_if_there_still_is_no_room(clock: ManualClock):
    org, api = Org(clock), Api(1)
    org.over = {(f"limit:{ORIGIN}", 1)}

    assert await org.context().step("ask", api.request) == 2

    assert [wait.occurrence for wait in org.waits] == [1]
    again = asyncio.create_task(org.context().step("again", Api(1, 2).request))
    await settle(40)
    assert [wait.occurrence for wait in org.waits] == [1, 1, 2]
    again.cancel()


async def test_the_attempt_parks_with_the_name_of_the_service(clock: ManualClock):
    org = Org(clock)

    async def handler() -> None:
        ctx = Context(org.given(), org.port(suspends=True), Cancellation(), on_park=org.parked.append)
        await ctx.step("ask", Api(1).request)

    task = asyncio.create_task(handler())
    await settle(60)

    assert org.parked == [Parked("asleep", f"limit:{ORIGIN}")]
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_after_its_first_request_a_step_raises(clock: ManualClock):
    org, api = Org(clock), Api(2)

    async def two() -> None:
        await api.request()
        await api.request()

    with pytest.raises(RateLimited):
        await org.context().step("ask", two)

    assert org.waits == []


async def test_a_step_is_not_tried_again_for_it(clock: ManualClock):
    org, api = Org(clock), Api(2, 3, 4)

    async def two() -> None:
        await api.request()
        await api.request()

    with pytest.raises(RateLimited):
        await org.context().step("ask", two, retries=2, backoff=0)

    assert api.number == 2


async def test_outside_of_a_step_and_in_a_map_it_is_raised(clock: ManualClock):
    org, api = Org(clock), Api(1, 2)

    async def one(item: int) -> int:
        return await api.request()

    with pytest.raises(RateLimited):
        await one(0)
    with pytest.raises(RateLimited):
        await org.context().map("ask", one, [1])

    assert org.waits == []


def test_a_step_of_a_handler_that_blocks_parks_too(clock: ManualClock):
    org, api = Org(clock), Api(1)

    with pytest.raises(Parking):
        org.blocking().step("ask", api.blocking_request)

    assert org.parked == [Parked("asleep", f"limit:{ORIGIN}")]
    org.over = {(f"limit:{ORIGIN}", 1)}
    assert org.blocking().step("ask", api.blocking_request) == 2


async def test_no_handler_waits_under_such_a_name(clock: ManualClock):
    with pytest.raises(StepError, match="reserved"):
        await Org(clock).context().wait_for("limit:https://api.example.com")
