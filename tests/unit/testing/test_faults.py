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
