"""What the process of a run may report: what only the worker knows must be so."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker.engine.runners.child.child_run import BROKEN, Ended, outcome_of_end
from worker.engine.runners.contract import GivenErrors, StopReason, StopSignal, after_stop
from worker.errors import IssuerUnavailable, LeaseLost, Throttled, WorkerError
from worker.model.runs.outcome import (
    Cancelled,
    Error,
    Failed,
    Gated,
    HandedBack,
    Lost,
    NoHandler,
    NoToken,
    Outcome,
    Parked,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
    TimedOut,
)

YEARS = timedelta(days=1_500)


def outcome_of(reported: Outcome, *given: WorkerError, stop: StopReason | None = None) -> Outcome:
    """What becomes of a report, after the worker gave these errors, and asked for this stop."""
    errors, signal = GivenErrors(), StopSignal()
    for error in given:
        errors.note(error)
    if stop is not None:
        signal.request(stop, 0)
    return outcome_of_end(reported, Ended(), signal, errors=errors)


@pytest.mark.parametrize(
    "reported",
    [
        Succeeded("1", '{"a":1}'),
        *(Failed(Error("E", "x"), reason) for reason in ("error", "result_invalid", "out_of_memory")),
        Failed(Error("E", "x"), "budget", permanent=True),
        Retried(YEARS),
        Snoozed(YEARS, "in four years"),
        Parked("answer", "approve"),
        NoHandler("declares state"),
        Cancelled("by_handler", "not needed"),
        Refused("settings_invalid", "model"),
    ],
)
async def test_a_handler_decides_what_it_may_decide(reported: Outcome) -> None:
    assert outcome_of(reported) == reported


@pytest.mark.parametrize(
    "reported",
    [
        Refused("org_mismatch"),
        Refused("secret_missing", "openai"),
        Refused("any text"),
        HandedBack(),
        HandedBack("the answer to its admission was lost"),
        NoToken(YEARS, "issuer_unavailable"),
        Lost("the worker died"),
        *(Cancelled(reason) for reason in ("requested", "suspended", "replaced", "closed", "any text")),
        *(Failed(Error("E", "x"), reason) for reason in ("lost", "handler_exited", "result_unstorable", "")),
        TimedOut(Error("E", "x")),
        Gated("flag_off"),
    ],
)
async def test_anything_else_is_handler_exited(reported: Outcome) -> None:
    outcome = outcome_of(reported)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "handler_exited"
    assert outcome.detail in (
        "it reported what only the worker decides",
        "it handed back without a drain",
        "it reported that it has no token, without such an error of the worker",
    )
    # The control: before, the report counted.
    assert after_stop(reported, StopSignal()) == reported


async def test_a_hand_back_answers_a_drain() -> None:
    assert outcome_of(HandedBack(), stop="drain") == HandedBack()


async def test_a_cancellation_has_the_reason_that_the_worker_asked_for() -> None:
    assert outcome_of(Cancelled("suspended"), stop="suspended") == Cancelled("suspended")
    assert outcome_of(Cancelled("requested"), stop="cancel") == Cancelled("requested")
    assert outcome_of(Cancelled("replaced"), stop="suspended") == Cancelled("suspended")
    assert outcome_of(Refused("org_mismatch"), stop="cancel") == Cancelled("requested")


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (IssuerUnavailable("away"), 30),
        (IssuerUnavailable("away", retry_after=4.0), 4),
        (Throttled("slowly", retry_after=7_200.0), 60),
    ],
)
async def test_a_run_without_a_token_waits_as_the_worker_said(error: WorkerError, seconds: int) -> None:
    assert outcome_of(NoToken(YEARS, "forged"), error) == NoToken(timedelta(seconds=seconds), error.code)
    assert isinstance(outcome_of(Lost("forged"), error), Failed)


async def test_a_lost_lease_is_one_that_the_worker_said() -> None:
    assert outcome_of(Lost("forged"), LeaseLost("it is so")) == Lost("it is so")
    assert isinstance(outcome_of(NoToken(YEARS), LeaseLost("it is so")), Failed)


async def test_a_broken_protocol_is_handler_exited() -> None:
    assert outcome_of(BROKEN) == BROKEN
    assert outcome_of(BROKEN, stop="drain") == HandedBack()
