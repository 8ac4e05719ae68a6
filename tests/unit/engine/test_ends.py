"""How a run's process ended, and what that makes of its attempt."""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta

import pytest

from worker.engine.runners.child.child_run import Ended, exit_detail, outcome_of_end
from worker.engine.runners.contract import StopReason, StopSignal
from worker.model.runs.outcome import (
    Cancelled,
    Error,
    Failed,
    HandedBack,
    Lost,
    Outcome,
    Retried,
    Snoozed,
    Succeeded,
    TimedOut,
)

FAILED = Failed(Error("ValueError", "x"))
PERMANENT = Failed(Error("PermanentError", "x"), permanent=True)


def stopped(reason: StopReason) -> StopSignal:
    stop = StopSignal()
    stop.request(reason, 0)
    return stop


@pytest.mark.parametrize(
    ("said", "reason", "outcome"),
    [
        (Succeeded("1"), "timeout", Succeeded("1")),
        (Succeeded("1"), "cancel", Succeeded("1")),
        (PERMANENT, "drain", PERMANENT),
        (Cancelled("by_handler", "x"), "drain", Cancelled("by_handler", "x")),
        (FAILED, "drain", HandedBack()),
        (FAILED, "cancel", Cancelled("requested")),
        (HandedBack(), "drain", HandedBack()),
        (HandedBack(), "cancel", Cancelled("requested")),
        (HandedBack(), "suspended", Cancelled("suspended")),
        (Retried(None), "drain", Retried(None)),
        (Retried(None), "replaced", Cancelled("replaced")),
        (Snoozed(timedelta(1)), "closed", Cancelled("closed")),
    ],
)
async def test_a_run_that_was_asked_to_stop_waits_again_only_after_a_drain(
    said: Outcome, reason: StopReason, outcome: Outcome
) -> None:
    assert outcome_of_end(said, Ended(), stopped(reason)) == outcome


@pytest.mark.parametrize("said", [FAILED, HandedBack(), Retried(None), Snoozed(timedelta(1)), None])
async def test_a_run_past_its_timeout_has_timed_out_unless_it_succeeded(said: Outcome | None) -> None:
    assert isinstance(outcome_of_end(said, Ended(signal.SIGKILL), stopped("timeout")), TimedOut)


async def test_a_run_whose_lease_is_lost_is_lost_whatever_it_says() -> None:
    stop = StopSignal()
    stop.kill()

    assert isinstance(outcome_of_end(Succeeded("1"), Ended(), stop), Lost)


async def test_what_the_zygote_killed_says_why() -> None:
    ended = Ended(signal.SIGKILL, why="out_of_memory")
    failed = outcome_of_end(None, ended, StopSignal(), memory=64 * 1024 * 1024)
    assert isinstance(failed, Failed)
    assert failed.reason == "out_of_memory"
    assert "64 MiB" in failed.error.message

    assert isinstance(outcome_of_end(None, Ended(signal.SIGKILL, why="frozen"), StopSignal()), Lost)
    assert isinstance(outcome_of_end(None, Ended(why="lost"), StopSignal()), Lost)
    assert outcome_of_end(None, Ended(why="lost"), stopped("cancel")) == Cancelled("requested")


@pytest.mark.parametrize(
    ("status", "detail"),
    [
        (0, "exit code 0"),
        (3 << 8, "exit code 3"),
        (signal.SIGSEGV, "signal SIGSEGV"),
        (signal.SIGSEGV | 0x80, "signal SIGSEGV"),
        (81 << 8, "its channel to the worker was closed"),
        (40, "signal 40"),
    ],
)
def test_a_wait_status_is_told_in_words(status: int, detail: str) -> None:
    assert exit_detail(status) == detail


async def test_frozen_time_adds_up_and_counts_while_it_lasts() -> None:
    stop = StopSignal()
    stop.freeze(10.0)
    stop.freeze(11.0)
    assert stop.frozen_seconds(12.0) == 2.0
    stop.thaw(13.0)
    stop.thaw(14.0)
    stop.freeze(20.0)
    assert stop.frozen_seconds(21.5) == 4.5


async def test_a_later_request_shortens_the_grace_and_never_lengthens_it() -> None:
    stop, loop = StopSignal(), asyncio.get_running_loop()
    stop.request("drain", 100)
    first = stop.kill_at
    assert abs(stop.interrupt_at - loop.time() - 50) < 1

    stop.request("cancel", 200)
    assert (stop.reason, stop.kill_at) == ("drain", first)
    stop.request("timeout", 10)
    assert stop.reason == "drain"
    assert abs(stop.kill_at - loop.time() - 10) < 1
    assert abs(stop.interrupt_at - loop.time() - 5) < 1


async def test_a_stop_notifies_then_interrupts_and_a_later_kill_ends_the_grace() -> None:
    stop, calls = StopSignal(), list[str]()
    stop.request("drain", 0.4)
    stopping = asyncio.create_task(stop.escalate(calls.append, lambda: calls.append("interrupt")))
    await stopping
    assert calls == ["drain", "interrupt"]

    stop, calls = StopSignal(), list[str]()
    stop.request("drain", 60)
    stopping = asyncio.create_task(stop.escalate(calls.append, lambda: calls.append("interrupt")))
    await asyncio.sleep(0)
    assert not stopping.done()
    stop.kill()
    await stopping
    assert calls == ["drain"]
