"""State and typed checkpoints: what a handler gets, changes and leaves, and what cannot be stored."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel, Field

from worker import BlockingContext, Context, PermanentError, Retry, job
from worker.handlers.given import STATE_LIMIT, State, check_state_text, to_state_text
from worker.handlers.json_text import NotStorable


def test_what_did_not_change_is_not_committed():
    assert State({"cursor": 5}).changed() is None


def test_a_change_is_the_text_of_the_whole_state():
    state = State({"cursor": 5, "seen": {"a": 1}})
    state.value["seen"]["b"] = 2

    assert state.changed() == '{"cursor":5,"seen":{"a":1,"b":2}}'


def test_what_was_loaded_does_not_change_with_the_handlers_copy():
    loaded = {"seen": [1]}

    State(loaded).value["seen"].append(2)

    assert loaded == {"seen": [1]}


def test_a_state_that_the_database_wrote_longer_than_the_limit_is_loaded():
    assert State({"n": "x" * STATE_LIMIT}).changed() is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"text": "x" * STATE_LIMIT}, "64.0 KiB of JSON; the maximum is 64 KiB"),
        ({"at": date(2030, 1, 1)}, "not JSON: a date"),
        ({"n": float("nan")}, "NaN"),
        ({"text": "\0"}, "NUL"),
        ([1], "not a JSON object"),
    ],
)
def test_what_cannot_be_stored_is_said(value: Any, problem: str):
    with pytest.raises(NotStorable, match=problem):
        to_state_text(value)


@pytest.mark.parametrize("text", ["[1]", "{", '"text"', '{"a":"' + "x" * STATE_LIMIT + '"}', '{"a":NaN}'])
def test_text_of_a_process_is_checked(text: str):
    with pytest.raises(NotStorable):
        check_state_text(text)


@job("t.counts", state=True)
async def counts(ctx: Context[Any, Any]) -> int:
    ctx.state["runs"] = ctx.state.get("runs", 0) + 1
    if ctx.run.attempt <= ctx.state.get("fail", 0):
        raise ValueError("not yet")
    return int(ctx.state["runs"])


@job("t.counts_blocking", state=True)
def counts_blocking(ctx: BlockingContext[Any, Any]) -> int:
    ctx.state["runs"] = ctx.state.get("runs", 0) + 1
    return int(ctx.state["runs"])


@pytest.mark.parametrize("handler", [counts, counts_blocking])
def test_a_success_leaves_what_the_handler_changed(orgworker, handler):
    finished = orgworker.run(handler, state={"runs": 2, "since": "monday"})

    assert finished.result == 3
    assert finished.definition_state == {"runs": 3, "since": "monday"}


def test_each_attempt_begins_with_the_state_of_the_last_success(orgworker):
    finished = orgworker.run(counts, state={"runs": 2, "fail": 2})

    assert [attempt.outcome for attempt in finished.attempts] == ["failed", "failed", "succeeded"]
    assert finished.definition_state == {"runs": 3, "fail": 2}


@pytest.mark.parametrize("end", [Retry("1m"), PermanentError("no"), ValueError("no")])
def test_only_a_success_leaves_anything(orgworker, end):
    @job("t.ends", state=True, max_attempts=1)
    async def ends(ctx: Context[Any, Any]) -> Any:
        ctx.state["runs"] = 1
        if isinstance(end, Exception):
            raise end
        return end

    assert orgworker.run(ends, attempts=1).definition_state == {}


def test_a_state_that_cannot_be_stored_fails_the_run_for_good(orgworker):
    @job("t.large", state=True)
    async def large(ctx: Context[Any, Any]) -> str:
        ctx.state["text"] = "x" * STATE_LIMIT
        return "done"

    finished = orgworker.run(large)

    assert (finished.state, finished.reason, len(finished.attempts)) == ("failed", "result_invalid", 1)
    assert finished.error["message"] == "the state is 64.0 KiB of JSON; the maximum is 64 KiB"
    assert (finished.definition_state, finished.result) == ({}, None)


def test_a_handler_without_state_is_told_how_to_have_one(orgworker):
    @job("t.plain", max_attempts=1)
    async def plain(ctx: Context[Any, Any]) -> None:
        ctx.state["runs"] = 1

    finished = orgworker.run(plain)

    assert finished.error["message"] == "ctx.state needs @job(..., state=True)"


def test_concurrent_runs_cannot_share_a_state(orgworker):
    finished = orgworker.run(counts, definition={"overlap": "allow"})

    assert (finished.state, finished.attempts[0].outcome) == ("failed", "failed")
    assert "overlap: t.counts declares state" in finished.error["message"]


class Place(BaseModel):
    page: int = Field(alias="p", ge=0)
    day: date = date(2030, 1, 1)


@job("t.walks", checkpoint=Place)
async def walks(ctx: Context[Any, Any]) -> Any:
    place: Place | None = ctx.checkpoint
    if place is None:
        await ctx.save(Place(p=3))
        return Retry()
    return {"page": place.page, "day": str(place.day)}


def test_a_typed_checkpoint_comes_back_as_the_model(orgworker):
    assert orgworker.run(walks).result == {"page": 3, "day": "2030-01-01"}


def test_a_checkpoint_that_no_longer_fits_fails_the_run_with_the_field_and_the_fix(orgworker):
    finished = orgworker.run(walks, checkpoint={"p": -1})

    assert (finished.state, len(finished.attempts)) == ("failed", 1)
    message = finished.error["message"]
    assert message.startswith("checkpoint field p: Input should be greater than or equal to 0; ")
    assert "without --from-checkpoint" in message


def test_saving_another_type_is_an_error_at_once(orgworker):
    @job("t.strays", checkpoint=Place, max_attempts=1)
    def strays(ctx: BlockingContext[Any, Any]) -> None:
        ctx.save({"p": 1})

    finished = orgworker.run(strays)

    assert finished.error["message"] == (
        "save() of t.strays takes a Place, as @job(checkpoint=) says, or None, not a dict"
    )
    assert finished.checkpoint is None


def test_an_attempt_that_parks_changes_nothing(orgworker):
    @job("t.sleeps", state=True)
    async def sleeps(ctx: Context[Any, Any]) -> int:
        ctx.state["runs"] = ctx.state.get("runs", 0) + 1
        await ctx.sleep("2d")
        return int(ctx.state["runs"])

    finished = orgworker.run(sleeps, state={"runs": 2})

    assert [attempt.outcome for attempt in finished.attempts] == ["parked", "succeeded"]
    assert (finished.result, finished.definition_state) == (3, {"runs": 3})
