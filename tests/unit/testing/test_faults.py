"""Faults that a test orders: each at its place, once, and told of where it never came."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.fakes.clock import utc
from worker import BlockingContext, Context, HandBack, job
from worker.testing import Crash, ProviderDown, SecretRotated, Stop, WrongOrg

URL = "https://api.example.com/pages"


@job("t.pages", scopes={"read:kb"}, timeout="1h")
async def pages(ctx: Context) -> int:
    done = (ctx.checkpoint or {}).get("done", 0)
    while done < 3:
        (await ctx.http.get(URL)).raise_for_status()
        done += 1
        await ctx.save({"done": done})
        if ctx.cancelled.is_set() and ctx.cancelled.reason == "drain":
            return HandBack()
        await asyncio.sleep(60)
    return done


@job("t.blocking_pages", scopes={"read:kb"}, timeout="1h")
def blocking_pages(ctx: BlockingContext) -> Any:
    done = (ctx.checkpoint or {}).get("done", 0)
    while done < 3:
        ctx.http.get(URL).raise_for_status()
        done += 1
        ctx.save({"done": done})
        if ctx.cancelled.wait(0) and ctx.cancelled.reason == "drain":
            return HandBack()
    return done


both = pytest.mark.parametrize("handler", [pages, blocking_pages], ids=["async", "blocking"])


def ok(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200)


@both
def test_a_provider_that_is_down_lets_the_run_wait_and_counts_as_nothing(orgworker, handler):
    finished = orgworker.run(handler, api=ok, faults=[ProviderDown(times=2)], definition={"max_attempts": 1})
    waiting = orgworker.run(handler, api=ok, faults=[ProviderDown()], attempts=1)

    assert [attempt.reason for attempt in finished.attempts] == ["no_token", "no_token", None]
    assert finished.state == "succeeded"
    assert (waiting.state, waiting.reason, len(waiting.requests)) == ("waiting", "no_token", 0)


@both
def test_a_token_of_another_org_refuses_the_run_before_the_handler_is_called(orgworker, handler):
    finished = orgworker.run(handler, org="org_acme", api=ok, faults=[WrongOrg("org_globex")])

    assert (finished.state, finished.reason, finished.detail) == ("refused", "org_mismatch", "other_org")
    assert finished.requests == ()


@both
def test_a_rotated_secret_is_a_401_and_another_token(orgworker, handler):
    finished = orgworker.run(handler, api=ok, faults=[SecretRotated(after=1)])

    assert (finished.state, len(finished.attempts)) == ("succeeded", 1)
    tokens = [request.headers["Authorization"] for request in finished.requests]
    assert len(tokens) == 3
    assert tokens[0] != tokens[1] == tokens[2]


@both
def test_a_token_renewed_for_another_org_ends_the_run_refused(orgworker, handler):
    finished = orgworker.run(handler, api=ok, faults=[SecretRotated(after=1), WrongOrg(after=1)])

    assert (finished.state, finished.reason) == ("refused", "org_mismatch")
    assert finished.checkpoint == {"done": 1}
    assert len(finished.requests) == 1


@both
def test_a_provider_down_at_the_renewal_lets_the_run_wait_with_its_checkpoint(orgworker, handler):
    faults = [SecretRotated(after=1), ProviderDown(after=1)]

    finished = orgworker.run(handler, api=ok, faults=faults)

    assert [attempt.reason for attempt in finished.attempts] == ["no_token", None]
    assert finished.state == "succeeded"


@both
def test_each_crash_is_another_attempt_from_the_newest_checkpoint(orgworker, handler):
    finished = orgworker.run(handler, api=ok, faults=[Crash(after_save=1), Crash(after_save=2)])

    assert [attempt.outcome for attempt in finished.attempts] == ["lost", "lost", "succeeded"]
    assert len(finished.requests) == 3


@both
def test_a_drain_hands_the_run_back_and_another_attempt_ends_it(orgworker, handler):
    finished = orgworker.run(handler, api=ok, faults=[Stop(reason="drain", after_save=2)])

    assert [attempt.reason for attempt in finished.attempts] == ["handed_back", None]
    assert (finished.state, len(finished.requests)) == ("succeeded", 3)


def test_a_cancel_ends_it_once_its_grace_is_over(orgworker):
    definition = {"cancel_grace": "20s"}

    finished = orgworker.run(pages, api=ok, faults=[Stop(after="90s")], definition=definition)

    assert (finished.state, finished.reason) == ("cancelled", "requested")
    assert orgworker.clock.now() == utc("2030-01-01T00:01:40")


def test_a_crash_may_come_at_a_time(orgworker):
    finished = orgworker.run(pages, api=ok, faults=[Crash(after="70s")])

    assert [attempt.outcome for attempt in finished.attempts] == ["lost", "succeeded"]
    assert finished.checkpoint == {"done": 3}


def test_a_killed_handler_saves_and_sends_no_more(orgworker):
    @job("t.stubborn")
    async def stubborn(ctx: Context) -> None:
        try:
            await ctx.save({"done": 1})
        finally:
            if ctx.run.attempt == 1:
                await ctx.save({"done": 2})
                await ctx.http.post(URL)

    finished = orgworker.run(stubborn, api=ok, faults=[Crash(after_save=1)])

    assert finished.checkpoint == {"done": 1}
    assert finished.requests == ()


def test_a_blocking_handler_that_does_not_look_is_interrupted(orgworker):
    seen = []

    @job("t.deaf")
    def deaf(ctx: BlockingContext) -> None:
        try:
            ctx.save({"done": 1})
            while True:
                ctx.progress(1)
        except BaseException as error:
            seen.append(type(error).__name__)
            raise

    definition = {"cancel_grace": "50ms"}

    finished = orgworker.run(deaf, faults=[Stop(after_save=1)], definition=definition)

    assert (finished.state, finished.reason) == ("cancelled", "requested")
    assert seen == ["Interrupted"]


def test_a_fault_that_never_came_fails_the_test(orgworker):
    with pytest.raises(AssertionError, match=r"Crash.*never happened: the run saved 3 times"):
        orgworker.run(pages, api=ok, faults=[Crash(after_save=4)])


@pytest.mark.parametrize("bad", [{}, {"after_save": 1, "after": "5s"}, {"after_save": 0}])
def test_when_a_fault_is_to_happen_must_be_said(bad):
    with pytest.raises(ValueError, match="after_save"):
        Crash(**bad)


@job("t.steps", timeout="1h")
async def steps(ctx: Context) -> list[Any]:
    async def ask(prompt: str) -> dict[str, Any]:
        response = await ctx.http.post("https://api.example.com/chat", json=prompt)
        return {"answer": prompt, "status": response.status_code, "by": ctx.run.attempt}

    one = await ctx.step("ask", ask, "one")
    two = await ctx.step("ask", ask, "two", retries=3, backoff="1h")
    return [one["by"], two["by"], *(each["by"] for each in await ctx.map("all", ask, "abc", concurrency=1))]


@job("t.blocking_steps", timeout="1h")
def blocking_steps(ctx: BlockingContext) -> list[Any]:
    def ask(prompt: str) -> dict[str, Any]:
        response = ctx.http.post("https://api.example.com/chat", json=prompt)
        return {"answer": prompt, "status": response.status_code, "by": ctx.run.attempt}

    one, two = ctx.step("ask", ask, "one"), ctx.step("ask", ask, "two")
    return [one["by"], two["by"], *(each["by"] for each in ctx.map("all", ask, "abc", concurrency=1))]


stepwise = pytest.mark.parametrize("handler", [steps, blocking_steps], ids=["async", "blocking"])


@stepwise
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_crash_after_a_step_repeats_no_call(orgworker, handler, after):
    finished = orgworker.run(handler, api=ok, faults=[Crash(after_step=after)])

    assert finished.result == [1] * after + [2] * (5 - after)
    assert [attempt.outcome for attempt in finished.attempts] == ["lost", "succeeded"]
    assert [request.content for request in finished.requests] == [
        f'"{prompt}"'.encode() for prompt in ("one", "two", "a", "b", "c")
    ]
    assert [(step.name, step.occurrence, step.attempt) for step in finished.steps] == [
        (name, occurrence, 1 + (place > after))
        for place, (name, occurrence) in enumerate(
            [("ask", 1), ("ask", 2), ("all", 1), ("all", 2), ("all", 3)], 1
        )
    ]
    assert finished.steps[0].result == {"answer": "one", "status": 200, "by": 1}


@stepwise
def test_a_drain_after_a_step_keeps_it(orgworker, handler):
    finished = orgworker.run(handler, api=ok, faults=[Stop(after_step=2, reason="drain")])

    assert finished.state == "succeeded"
    assert len(finished.requests) == len(finished.steps) == 5


def test_a_fault_needs_one_place():
    with pytest.raises(ValueError, match="Crash needs one of after_save=N, after_step=N and after=DURATION"):
        Crash(after_save=1, after_step=1)
    with pytest.raises(ValueError, match="after_step counts from 1"):
        Stop(after_step=0)


def test_a_step_that_never_comes_is_told(orgworker):
    with pytest.raises(AssertionError, match="never happened: .* stored 5 steps"):
        orgworker.run(steps, api=ok, faults=[Crash(after_step=6)])


@stepwise
def test_each_request_of_a_step_has_the_same_key_in_each_attempt(orgworker, handler):
    """A crash after the call and before its result is stored repeats it: the service can recognise it."""
    run = orgworker.run(handler, api=ok)
    keys = [request.headers["Idempotency-Key"] for request in run.requests]

    assert len(set(keys)) == 5
    assert all(len(key) == 32 for key in keys)


def test_a_retry_of_a_step_repeats_the_keys_of_its_requests(orgworker):
    tries = []

    @job("t.twice")
    async def twice(ctx: Context) -> None:
        async def ask() -> None:
            await ctx.http.post(URL)
            await ctx.http.post(URL, headers={"Idempotency-Key": "of the handler"})
            await ctx.http.post(URL)
            tries.append(1)
            if len(tries) < 2:
                raise ConnectionError("again")

        await ctx.http.post(URL)
        await ctx.step("ask", ask, retries=1)

    finished = orgworker.run(twice, api=ok)

    outside, *inside = [request.headers["Idempotency-Key"] for request in finished.requests]
    assert outside == finished.requests[0].headers["Idempotency-Key"] and "-" in outside
    assert inside[:3] == inside[3:]
    assert inside[1] == "of the handler"
    assert len({outside, *inside}) == 4
