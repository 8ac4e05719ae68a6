"""What an outcome makes of its run: ended, or waiting again, and what counts against what."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any, get_args

import pytest

from tests.fakes.clock import START
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions import RetryPolicy
from worker.model.runs.outcome import (
    Cancelled,
    EndedAttempt,
    Error,
    Failed,
    Gated,
    HandedBack,
    Lost,
    NoHandler,
    NoToken,
    Outcome,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
    TimedOut,
    Trail,
    backoff,
    end_attempt,
    fingerprint,
    summary,
)
from worker.model.runs.run import AdmittedRun
from worker.store.tables import ATTEMPT_OUTCOMES, FINAL_STATES, WAITING_REASONS

BOOM = Error("ValueError", "boom", "trace")
MINUTE = timedelta(minutes=1)
POLICY = RetryPolicy(max_attempts=3, backoff=timedelta(seconds=10), backoff_max=MINUTE)
RUN = AdmittedRun(
    id=RunId("r"),
    org_id=OrgId("o"),
    definition_id=DefinitionId("d"),
    revision=1,
    handler="acme.digest",
    isolation="child",
    origin="schedule",
    scheduled_for=START,
    available_at=START,
    start_by=START + MINUTE,
    started_at=START,
    attempt=4,
    failures=0,
    recoveries=0,
    fencing_token=7,
    idempotency_key="k",
    params=None,
)


class Longest(Random):
    """The longest delay that could be drawn."""

    def uniform(self, a: float, b: float) -> float:
        return b


def ended(
    outcome: Outcome, *, policy: RetryPolicy = POLICY, trail: Trail | None = None, **run: Any
) -> EndedAttempt:
    return end_attempt(
        replace(RUN, **run),
        outcome,
        trail or Trail("acme.digest"),
        policy,
        now=START + MINUTE,
        random=Longest(),
    )


@pytest.mark.parametrize(
    ("outcome", "attempt", "state", "reason"),
    [
        (Succeeded('{"a": 1}'), "succeeded", "succeeded", None),
        (Failed(BOOM), "failed", "waiting", "retry"),
        (Failed(BOOM, "handler_exited", "exit code 3"), "failed", "waiting", "retry"),
        (Failed(BOOM, permanent=True), "failed", "failed", "error"),
        (Failed(BOOM, "result_invalid"), "failed", "failed", "result_invalid"),
        (TimedOut(BOOM), "timed_out", "waiting", "retry"),
        (Retried(), "retry", "waiting", "retry"),
        (Snoozed(MINUTE), "snoozed", "waiting", "snoozed"),
        (Cancelled("requested"), "cancelled", "cancelled", "requested"),
        (Cancelled("by_handler", "nothing to do"), "cancelled", "cancelled", "by_handler"),
        (HandedBack(), "handed_back", "waiting", "handed_back"),
        (Lost(), "lost", "waiting", "recovered"),
        (Refused("org_mismatch", "org_other"), "refused", "refused", "org_mismatch"),
        (NoToken(MINUTE), "no_token", "waiting", "no_token"),
        (NoHandler(), "handed_back", "waiting", "no_handler"),
        (Gated("flag_off", "agent-v2"), "gated", "skipped", "flag_off"),
        (Gated("expired"), "gated", "skipped", "expired"),
    ],
    ids=lambda value: repr(value) if isinstance(value, get_args(Outcome)) else None,
)
def test_each_outcome_ends_the_attempt_and_moves_the_run(outcome, attempt, state, reason):
    row = ended(outcome)

    assert (row.outcome, row.state, row.reason) == (attempt, state, reason)
    assert row.outcome in ATTEMPT_OUTCOMES
    assert row.state in FINAL_STATES or (row.state == "waiting" and row.reason in WAITING_REASONS)
    assert (row.run_id, row.fencing_token, row.attempt) == (RUN.id, 7, 4)
    assert (row.started_at, row.ended_at) == (START, START + MINUTE)


@pytest.mark.parametrize(
    "outcome", [Failed(BOOM), TimedOut(BOOM), Retried()], ids=["failed", "timed_out", "retry"]
)
def test_the_last_attempt_that_counts_ends_the_run(outcome):
    first, last = ended(outcome, failures=1), ended(outcome, failures=2)

    assert (first.state, first.failures) == ("waiting", 2)
    assert (last.state, last.failures) == ("failed", 3)
    assert last.reason == ("timed_out" if isinstance(outcome, TimedOut) else "error")
    assert last.error is not None
    assert last.error_cause


@pytest.mark.parametrize(
    "outcome",
    [Snoozed(MINUTE), HandedBack(), NoToken(MINUTE), NoHandler(), Lost()],
    ids=["snoozed", "handed_back", "no_token", "no_handler", "lost"],
)
def test_what_is_not_the_handlers_failure_does_not_count_as_one(outcome):
    assert ended(outcome, failures=2).failures == 2
    assert ended(outcome, failures=2).state == "waiting"


def test_the_delay_doubles_from_the_first_up_to_the_longest():
    delays = [
        ended(Failed(BOOM), policy=replace(POLICY, max_attempts=9), failures=n).available_after
        for n in range(5)
    ]

    assert delays == [timedelta(seconds=s) for s in (10, 20, 40, 60, 60)]


def test_the_delay_is_drawn_from_the_whole_range():
    delays = [backoff(POLICY, 2, Random(n)) for n in range(200)]

    assert min(delays) < timedelta(seconds=2)
    assert timedelta(seconds=18) < max(delays) <= timedelta(seconds=20)


def test_the_delay_never_overflows():
    policy = RetryPolicy(backoff=timedelta(days=30_000), backoff_max=timedelta(days=36_000))

    assert backoff(policy, 2**31, Longest()) == timedelta(days=36_000)


def test_the_handler_may_say_itself_when_to_try_again():
    assert ended(Retried(timedelta(minutes=9))).available_after == timedelta(minutes=9)
    assert ended(Retried(timedelta(0))).available_after == timedelta(0)


def test_a_snooze_and_a_missing_token_wait_as_long_as_they_say():
    assert ended(Snoozed(MINUTE)).available_after == MINUTE
    assert ended(NoToken(MINUTE)).available_after == MINUTE
    assert ended(HandedBack()).available_after is None
    assert ended(Lost()).available_after is None


def test_a_run_lost_too_often_without_a_new_checkpoint_has_failed():
    third, fourth = ended(Lost(), recoveries=2), ended(Lost(), recoveries=3)

    assert (third.state, third.recoveries) == ("waiting", 3)
    assert (fourth.state, fourth.reason, fourth.outcome) == ("failed", "lost", "lost")


def test_the_start_deadline_holds_until_the_handler_has_started():
    never = ended(NoToken(MINUTE))
    begun = ended(HandedBack(), trail=Trail("acme.digest", handler_started_at=START))

    assert never.keep_start_by
    assert not begun.keep_start_by


def test_a_refusal_says_why_in_its_error():
    assert ended(Refused("settings_invalid", "max_tokens")).error == {
        "type": "Refused",
        "message": "settings_invalid: max_tokens",
    }
    assert ended(Refused("token_invalid", None, "no signature")).error == {
        "type": "Refused",
        "message": "no signature",
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("row 17 of 200 is bad", "row 3 of 9000 is bad"),
        ("no run 0197a2b4-1c2d-7e3f-8a9b-0c1d2e3f4a5b", "no run 0297a2b4-1c2d-7e3f-8a9b-0c1d2e3f4a5b"),
        ("cannot read 'a.txt'", "cannot read 'b/c.txt'"),
        (
            "GET https://api.acme.com/kb?page=4 answered 500",
            "GET https://api.acme.com/kb?page=5 answered 502",
        ),
        ("org_123456789 is gone", "org_987654321 is gone"),
        ("object at 0x7f3a2b1c0d is odd", "object at 0x7f3a2b1c0e is odd"),
        ("it broke\nline 1", "it broke\nline 2"),
    ],
)
def test_errors_that_differ_in_values_only_have_one_cause(one, other):
    assert fingerprint(Error("E", one)) == fingerprint(Error("E", other))


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("the CRM answers 503 for article 4711", "the CRM answers 503 for article <n>"),
        (
            "Server error '503 Service Unavailable' for url 'https://crm.acme.com/contacts?page=3'",
            "Server error 503 Service Unavailable for url <text>",
        ),
        (
            "503 Server Error: Service Unavailable for url: https://crm.acme.com/x/1",
            "503 Server Error: Service Unavailable for url: <url>",
        ),
        ("GET http://crm.acme.com/contacts returned 503", "GET <url> returned 503"),
        ("HTTP 429 after 17 tries", "HTTP 429 after <n> tries"),
        ("status_code=404, id 404", "status_code=404, id <n>"),
        ("cannot read (https://crm.acme.com/a)", "cannot read (<url>)"),
        ("503 rows of 504", "<n> rows of <n>"),
        ("error 503.5 in 2 steps", "error <n> in <n> steps"),
    ],
)
def test_a_summary_keeps_the_status_of_a_response_and_no_half_of_a_pair_of_quotes(message: str, cause: str):
    assert summary({"type": "E", "message": message}) == f"E: {cause}"
    assert "'" not in fingerprint(Error("E", message))


@pytest.mark.parametrize(
    "piece", ["_", "error ", "HTTP/1.", "Server error '5", "a_", "0x", "'", '"', "f", "1.", "https://"]
)
def test_the_cause_of_a_long_message_is_found_in_linear_time(piece):
    """It took a second for 4,000 underscores, and four times as long for twice as many."""
    assert len(fingerprint(Error("E", piece * 100_000))) <= 200
    assert len(summary({"type": "E", "message": piece * 100_000})) <= 200


@pytest.mark.parametrize(
    ("word", "is_id"),
    [
        ("org_1", True),
        ("_a_1b", True),
        ("__1", True),
        ("_1", False),
        ("a1_b", False),
        ("a1_b2_", True),
        ("a_b", False),
    ],
)
def test_a_word_with_an_underscore_and_a_digit_after_it_is_an_id(word, is_id):
    assert ("<id>" in fingerprint(Error("E", f"no {word} here"))) == is_id


def test_errors_of_other_kinds_have_other_causes():
    causes = {
        fingerprint(Error("E", "it broke")),
        fingerprint(Error("F", "it broke")),
        fingerprint(Error("E", "it can't open, and won't")),
        fingerprint(Error("E", "it can't close, and won't")),
    }

    assert len(causes) == 4
    assert all(len(cause) <= 200 for cause in causes)
