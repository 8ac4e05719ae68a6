"""Why, in words: every reason that a run can have is understood, and each command is one of ours."""

from __future__ import annotations

import string
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.cli.app import command as command_line
from worker.runs.why import CAUSES, NEXT, last_error, why_run
from worker.store.tables import WAITING_REASONS

AT = datetime(2030, 1, 1, 3, tzinfo=UTC)
RUN = "0192aaaa-0000-7000-8000-000000000001"
REASONS = {
    "refused": [
        "org_mismatch",
        "client_mismatch",
        "scope_missing",
        "property_missing",
        "settings_invalid",
        "secret_missing",
        "pool_mismatch",
        "token_invalid",
    ],
    "skipped": ["flag_off", "expired"],
    "failed": [
        "error",
        "timed_out",
        "handler_exited",
        "result_invalid",
        "result_unstorable",
        "out_of_memory",
        "budget",
        "lost",
    ],
    "cancelled": ["requested", "suspended", "replaced", "closed", "by_handler"],
    "waiting": list(WAITING_REASONS),
    "succeeded": [None],
    "running": [None],
}
ALL = [(state, reason) for state, reasons in REASONS.items() for reason in reasons]


def run(state: str, reason: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "id": RUN,
        "org": "org_acme",
        "definition": "digest",
        "handler": "acme.digest",
        "pool": "eu",
        "scheduled_for": AT,
        "state": state,
        "reason": reason,
        "detail": "agent-v2",
        "available_at": AT,
        "attempt": 1,
        "worker": "w1",
        "started_at": AT,
        "error": {"type": "KeyError", "message": "'title'\nmore"},
        "checkpoint": None,
        "attempts": [],
        "waits": [],
        "retried_as": None,
    } | changes


@pytest.mark.parametrize(("state", "reason"), ALL)
def test_every_reason_has_its_words_and_a_command_that_exists(state, reason):
    assert (state, reason) in CAUSES
    why = why_run(run(state, reason))

    assert why.what.startswith(f"Run {RUN} of org_acme/digest for 2030-01-01T03:00:00.000000Z ")
    assert "{" not in why.sentence
    assert why.sentence.count("  ") == 0
    noun, verb, *rest = why.next.split()
    command = command_line(None).commands[noun].commands[verb]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


def test_no_words_are_for_a_reason_that_no_run_has():
    assert set(CAUSES) == set(ALL)
    assert set(NEXT) <= set(ALL)


def test_every_word_that_is_filled_in_is_a_column():
    known = {*run("failed", None), "wait"}  # the first of `waits`
    for text in [*CAUSES.values(), *NEXT.values()]:
        assert {name for _, name, _, _ in string.Formatter().parse(text) if name} <= known


def test_a_failure_names_the_error_and_what_is_kept():
    attempts = [{"handler_started_at": AT}]
    why = why_run(run("failed", "error", attempts=attempts, checkpoint={"done": 3}))

    assert why.cause == "its handler raised KeyError: 'title'"
    assert why.kept == 'retained: its last checkpoint ({"done": 3}), its attempts and their log'
    assert "idempotency key" in why.retry
    assert why.next == f"runs retry {RUN} --from-checkpoint"


@pytest.mark.parametrize(
    ("state", "says", "command"),
    [
        ("succeeded", "it was retried as run r2, which succeeded: no other retry is needed", "runs show r2"),
        ("failed", "it was retried as run r2, which failed", "runs why r2"),
        ("waiting", "it was retried as run r2, which is waiting", "runs why r2"),
    ],
)
def test_a_retried_failure_says_how_its_retry_went(state, says, command):
    why = why_run(run("failed", "error", retried_as="r1"), retried={"id": "r2", "state": state})

    assert (why.retry, why.next, why.facts["retried_as"]) == (says, command, "r1")


def test_what_never_started_is_safe_to_retry():
    why = why_run(run("refused", "scope_missing", detail="read:kb", attempts=[{"handler_started_at": None}]))

    assert why.cause == "its token lacks the scope read:kb"
    assert why.retry == "a retry is safe: its handler has not started"
    assert why.next == "orgs check org_acme"


def test_a_retry_is_not_named_where_a_flag_that_is_off_would_end_it_the_same():
    assert why_run(run("skipped", "flag_off")).next == "orgs check org_acme"


def test_a_run_that_is_asked_to_stop_says_so():
    assert why_run(run("running", None, cancel_requested_at=AT)).cause.endswith("and was asked to stop")


def test_an_unknown_reason_of_a_newer_release_is_named():
    assert why_run(run("failed", "eclipse")).cause == "its reason is eclipse"


def test_a_long_checkpoint_is_not_quoted():
    why = why_run(run("failed", "error", checkpoint={"seen": ["article"] * 20}))

    assert why.kept == "retained: its last checkpoint"


def test_without_a_checkpoint_it_says_where_a_retry_begins():
    why = why_run(run("failed", "error", attempts=[{"handler_started_at": AT}]))

    assert why.kept.endswith(
        "its attempts and their log, but no checkpoint: it would start from the beginning"
    )
    assert why.next == f"runs retry {RUN}"


@pytest.mark.parametrize(
    ("reason", "others", "more", "said"),
    [
        ("error", 0, False, "No other org had the same error in the hour around it."),
        ("error", 1, False, "1 other org had the same error in the hour around it."),
        ("error", 40, False, "40 other orgs had the same error in the hour around it."),
        ("error", 40, True, "At least 40 other orgs had the same error in the hour around it."),
        ("no_token", 0, False, "No other org is waiting for a token."),
        ("no_token", 1, False, "1 other org is waiting for a token."),
        ("no_token", 2, False, "2 other orgs are waiting for a token."),
    ],
)
def test_it_says_whether_it_is_this_org_alone(reason: str, others: int, more: bool, said: str):
    why = why_run(run("waiting" if reason == "no_token" else "failed", reason), others=others, more=more)

    assert said in why.sentence
    assert why.as_row()["other_orgs"] == others


def test_where_nobody_looked_nothing_is_said_of_others():
    why = why_run(run("succeeded", None))

    assert (why.others, why.facts["other_orgs"]) == (None, None)
    assert "other org" not in why.sentence


def test_only_an_end_that_is_the_runs_reason_is_compared_with_others():
    ended = {"ended_at": AT, "error_cause": "KeyError: <text>", "handler_started_at": AT}

    assert last_error(run("failed", "error", attempts=[ended])) == ended
    assert last_error(run("waiting", "retry", attempts=[ended])) == ended
    assert last_error(run("waiting", "due", attempts=[ended])) is None
    assert last_error(run("succeeded", None, attempts=[ended])) is None
    assert last_error(run("failed", "error", attempts=[ended | {"error_cause": None}])) is None
    assert last_error(run("failed", "error")) is None


def test_a_budget_that_asks_says_how_to_answer_it():
    wait = {
        "name": "budget:llm_tokens", "occurrence": 2, "kind": "budget", "ask": {"used": 9}, "until": AT,
        "opened_at": AT, "answered_at": None, "timed_out_at": None,
    }  # fmt: skip
    asking = why_run(run("waiting", "budget", waits=[wait]))
    silent = why_run(run("waiting", "budget", waits=[wait | {"ask": None}]))

    assert asking.next == f"runs answer {RUN} budget:llm_tokens --occurrence 2 --data '{{\"by\": N}}'"
    assert silent.next == "budgets list --org org_acme"
