"""Why, in words: every reason that a run can have is understood, and each command is one of ours."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from worker.features.console.pages.links import step_path
from worker.handlers.public_http import AddressRefused
from worker.model.egress import Owner, not_listed
from worker.model.runs.causes import BLOCKS, CAUSES, FOR_CUSTOMER, kept_reason, last_reason
from worker.model.runs.clauses import clauses, listed, row_of, sentence
from worker.model.runs.next_steps import VERBS
from worker.model.runs.why import SinceThen, Why, blocked, last_error, solved, why_run
from worker.store.lists.rows import Run, columns_of
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
        "secret_bound",
        "pool_mismatch",
        "token_invalid",
        "params_invalid",
        "org_inactive",
        "definition_closed",
        "overlap",
        "child_exceeds",
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
    "cancelled": ["requested", "suspended", "replaced", "closed", "parent", "by_handler"],
    "waiting": list(WAITING_REASONS),
    "succeeded": [None],
    "running": [None],
}
# Values of blocks that are no columns of a run.
FILLED = (
    "state_by", "state_at", "limit", "worker_may_be_down", "silent_since", "offered", "load_error", "pools",
    "declared", "pending", "unless", "digest", "starts_at",
)  # fmt: skip
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
        "created_at": AT,
        "worker": "w1",
        "started_at": AT,
        "finished_at": None,
        "progress": None,
        "error": {"type": "KeyError", "message": "'title'\nmore"},
        "checkpoint": None,
        "attempts": [],
        "waits": [],
        "retried_as": None,
    } | changes


QUESTION = {
    "name": "approval", "occurrence": 1, "kind": "answer", "ask": "Send it?", "options": ["yes", "no"],
    "opened_at": AT, "until": None, "answered_at": None, "timed_out_at": None,
}  # fmt: skip
FAILED_ATTEMPT = {
    "handler_started_at": AT, "ended_at": AT, "error": {"type": "OSError", "message": "gone"},
    "error_cause": "OSError: gone",
}  # fmt: skip
# Words that a customer must not read: handlers, workers, ids, errors and other orgs.
INTERNAL = re.compile(
    r"acme\.digest|w1|agent-v2|KeyError|title|org_acme|worker|handler|run [0-9a-f]|0192aaaa", re.I
)
RENDERED = [
    *((f"{state}.{reason}", why_run(run(state, reason))) for state, reason in ALL),
    *(
        (f"skipped.expired.{reason}", why_run(run("skipped", "expired", detail=f"{reason}: why")))
        for reason in WAITING_REASONS
    ),
    *(
        (f"blocked by {block}", blocked(why_run(run("waiting", "due")), block, **dict.fromkeys(FILLED, "x")))
        for block in BLOCKS
    ),
    ("waiting.retry, with its error", why_run(run("waiting", "retry", attempts=[FAILED_ATTEMPT]))),
    ("waiting.answer, asked", why_run(run("waiting", "answer", waits=[QUESTION]))),
    ("waiting.budget, asked", why_run(run("waiting", "budget", waits=[QUESTION | {"kind": "budget"}]))),
]


@pytest.mark.parametrize("found", [why for _, why in RENDERED], ids=[name for name, _ in RENDERED])
def test_every_state_and_reason_is_an_answer_on_each_surface(found: Why):
    said = clauses(found)
    row = row_of(found)

    assert said.what.startswith(f"Run {RUN} of org_acme/digest for 2030-01-01T03:00:00.000000Z ")
    assert "{" not in sentence(found).replace('{"by": N}', "")
    assert "  " not in sentence(found)
    # What a list says of it is how the answer begins.
    if found.run["state"] == "succeeded":
        assert listed(found.run) == ""
    else:
        assert listed(found.run)
        assert f"{said.cause}; ".startswith(f"{listed(found.run)}; ")
    # Data: kind, whose, since, subject, verb.
    assert row["kind"].startswith(str(found.run["state"]))
    assert row["whose"] in (None, *FOR_CUSTOMER)
    assert (row["whose"] is None) == (found.run["state"] in ("succeeded", "running"))
    assert row["since"] == (None if found.run["state"] == "succeeded" else AT)
    assert row["verb"] in VERBS
    assert all(isinstance(value, str) for value in row["subject"].values())
    # The same step on the command line and on the console.
    assert row["next"] == found.step.command
    assert step_path(found.step).startswith("/")
    # What a customer is told has no internals.
    assert said.customer.startswith("The job digest, planned for ")
    assert not INTERNAL.search(said.customer), said.customer


def test_a_list_reads_no_more_than_the_columns_of_its_rows():
    """Each row of `runs list` has all that its cause needs, and nothing that only `runs show` has is said."""
    for state, reason in ALL:
        shown = run(state, reason, cancel_requested_at=AT, waits=[QUESTION], attempts=[FAILED_ATTEMPT])
        row = {name: shown.get(name) for name in columns_of(Run)}

        assert listed(row) == listed(shown)
        assert clauses(why_run(shown)).cause.startswith(listed(row))


@pytest.mark.parametrize(
    "evil", ["{0.__class__}", "{run[id]}", "{", "}}", "%(name)s", "{detail}", "<b>{{7*7}}</b>"]
)
def test_what_a_handler_says_is_no_template(evil: str):
    attempts = [FAILED_ATTEMPT | {"error": {"type": evil}}]
    found = why_run(run("waiting", "retry", detail=evil, error=None, attempts=attempts))

    assert listed(found.run).startswith(f"its last attempt failed ({evil}); ")
    assert clauses(found).cause.endswith(f"; it failed with {evil}")
    assert listed(run("failed", "error", error={"type": evil, "message": evil})) == f"{evil}: {evil}"


def test_progress_follows_the_cause_of_a_run_that_is_not_done():
    going = run("running", None, progress={"done": 3, "total": 10, "note": "pages"})
    since = "it has been running since 2030-01-01T03:00:00.000000Z"

    assert listed(going) == f"{since}; 3 of 10 done, pages"
    assert listed(going | {"progress": {"done": 0, "total": None, "note": None}}) == f"{since}; 0 done"
    assert listed(going | {"progress": {}}) == since
    assert listed(going | {"state": "failed", "reason": "lost", "finished_at": AT}) == (
        "its worker died too often without a new checkpoint"
    )


def test_no_words_are_for_a_reason_that_no_run_has():
    assert set(CAUSES) == set(ALL)


@pytest.mark.parametrize(
    ("owners", "whose", "command", "where"),
    [
        (["handler"], "handler", "handlers show acme.digest", "egress of its @job(...) has its origin"),
        (
            ["definition"], "operator", "definitions show org_acme digest",
            "egress of its definition has its origin",
        ),
        (["operator"], "operator", "config show", "[execution] egress of worker.toml has its origin"),
        (
            ["handler", "operator"], "handler", "handlers show acme.digest",
            "egress of its @job(...) has its origin and [execution] egress of worker.toml has its origin",
        ),
    ],
)  # fmt: skip
def test_a_denied_origin_is_listed_first_and_not_retried(
    owners: list[Owner], whose: str, command: str, where: str
):
    message = not_listed("https://evil.test", owners)
    why = why_run(run("failed", "error", error={"type": "EgressDenied", "message": message}))

    assert (why.whose, why.probably, why.step.command) == (whose, False, command)
    assert clauses(why).cause == f"EgressDenied: {message}"
    assert clauses(why).retry == f"a retry is denied until {where}"


def test_a_private_address_needs_private_origins():
    message = str(AddressRefused(httpx.URL("https://db.internal/x"), "private"))
    why = why_run(run("failed", "error", error={"type": "AddressRefused", "message": message}))

    assert why.step.command == "config show"
    assert 'add "https://db.internal:443" to [execution] private_origins' in clauses(why).cause
    assert "private_origins or api_origins has its origin" in clauses(why).retry


def test_a_failure_after_a_denied_request_names_that_too():
    """A library has raised an error of its own: its handler may have passed over the denial."""
    sent = [{"origin": "https://evil.test", "denied": 2}, {"origin": "https://api.test", "denied": 0}]
    why = why_run(run("failed", "error", egress=sent))

    assert clauses(why).cause == (
        "KeyError: 'title'; requests to https://evil.test were not sent: it may not reach that"
    )
    assert why.step.command == f"runs retry {RUN}"


def test_a_denied_run_that_was_retried_leads_to_its_retry():
    error = {"type": "EgressDenied", "message": not_listed("https://evil.test", ["handler"])}
    why = why_run(run("failed", "error", error=error), retried={"id": "r2", "state": "succeeded"})

    assert why.step.command == "runs show r2"
    assert "no other retry is needed" in clauses(why).retry


def test_a_text_for_the_customer_is_about_the_job_alone():
    """The control: what the operator reads does have what the customer must not."""
    assert INTERNAL.search(clauses(why_run(run("failed", "error"))).cause)


def test_a_failure_names_the_error_and_what_is_kept():
    attempts = [{"handler_started_at": AT}]
    why = why_run(run("failed", "error", attempts=attempts, checkpoint={"done": 3}))

    assert clauses(why).cause == "KeyError: 'title'"
    assert clauses(why).kept == 'retained: its last checkpoint ({"done": 3}), its attempts and their log'
    assert "idempotency key" in clauses(why).retry
    assert why.step.command == f"runs retry {RUN} --from-checkpoint"


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

    assert (clauses(why).retry, why.step.command, row_of(why)["retried_as"]) == (says, command, "r1")


def test_what_never_started_is_safe_to_retry():
    why = why_run(run("refused", "scope_missing", detail="read:kb", attempts=[{"handler_started_at": None}]))

    assert clauses(why).cause == "its token lacks the scope read:kb"
    assert clauses(why).retry == "retry it once that is fixed; that is safe: its handler has not started"
    assert why.step.command == "orgs check org_acme"


def test_a_retry_is_not_named_where_a_flag_that_is_off_would_end_it_the_same():
    assert why_run(run("skipped", "flag_off")).step.command == "orgs check org_acme"


def test_a_run_that_is_asked_to_stop_says_so():
    assert clauses(why_run(run("running", None, cancel_requested_at=AT))).cause.endswith(
        "; it was asked to stop"
    )


def test_an_unknown_reason_of_a_newer_release_is_named():
    assert clauses(why_run(run("failed", "eclipse"))).cause == "its reason is eclipse (agent-v2)"


def test_a_long_checkpoint_is_not_quoted():
    why = why_run(run("failed", "error", checkpoint={"seen": ["article"] * 20}))

    assert clauses(why).kept == "retained: its last checkpoint"


def test_without_a_checkpoint_it_says_where_a_retry_begins():
    why = why_run(run("failed", "error", attempts=[{"handler_started_at": AT}]))

    assert clauses(why).kept.endswith(
        "its attempts and their log, but no checkpoint: it would start from the beginning"
    )
    assert why.step.command == f"runs retry {RUN}"


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

    assert said in sentence(why)
    assert row_of(why)["other_orgs"] == others


def test_where_nobody_looked_nothing_is_said_of_others():
    why = why_run(run("succeeded", None))

    assert (clauses(why).others, why.other_orgs) == (None, None)
    assert "other org" not in sentence(why)


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

    assert asking.step.command == f"runs answer {RUN} budget:llm_tokens --occurrence 2 --data '{{\"by\": N}}'"
    assert silent.step.command == "budgets list --org org_acme"


def test_a_question_is_shown_with_its_options_since_when_and_the_command():
    why = why_run(run("waiting", "answer", waits=[QUESTION]))
    said = clauses(why)

    assert said.cause == (
        "its handler waits for an answer (agent-v2), without a process; it asked for approval (since "
        "2030-01-01T03:00:00.000000Z)"
    )
    assert said.question == "it asks: Send it?"
    assert said.retry == "it goes on when somebody answers: yes / no"
    # As it stands it is refused: nobody gives an answer by pasting it.
    assert why.step.command == f"""runs answer {RUN} approval --data '"yes" | "no"'"""
    assert row_of(why)["questions"] == [
        {
            "name": "approval", "occurrence": 1, "ask": "Send it?", "options": ("yes", "no"), "binds": True,
            "since": AT, "until": None,
        }
    ]  # fmt: skip


def test_options_within_a_question_are_suggestions():
    why = why_run(run("waiting", "answer", waits=[QUESTION | {"ask": {"options": ["a"]}, "options": None}]))

    assert (list(why.questions[0].options), why.questions[0].binds) == (["a"], False)


def test_a_run_that_expired_says_what_it_waited_for():
    detail = kept_reason("no_token", "credentials_rejected: issuer main rejects those of ACME")
    why = why_run(run("skipped", "expired", detail=detail))
    said = clauses(why)

    assert said.cause == (
        "its org had no token: issuer main rejects those of ACME, until its start_deadline passed"
    )
    assert (why.whose, why.probably) == ("org", False)
    assert why.step.command == "orgs check org_acme"
    assert said.retry.startswith("retry it once that is fixed")
    # Once it is fixed, a retry comes next. The control: of a run that was only due it always does.
    assert solved(why).step.command == f"runs retry {RUN}"
    assert why_run(run("skipped", "expired", detail=None)).step.command == f"runs retry {RUN}"


@pytest.mark.parametrize(
    ("reason", "detail", "kept"),
    [
        ("due", None, None),
        (None, None, None),
        ("no_handler", None, "no_handler"),
        ("no_pool", "eu", "no_pool: eu"),
    ],
)
def test_an_expired_run_keeps_the_last_reason_other_than_due(reason, detail, kept):
    assert kept_reason(reason, detail) == kept
    assert last_reason(kept) == (("", "") if kept is None else (reason, detail or ""))


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (
            {"type": "HTTPStatusError", "message": "Server error '503 Service Unavailable' for url 'x'"},
            "remote_api",
        ),
        ({"type": "RuntimeError", "message": "the CRM answered 502"}, "remote_api"),
        ({"type": "ConnectTimeout", "message": ""}, "remote_api"),
        ({"type": "KeyError", "message": "'title'"}, "handler"),
        ({"type": "ValueError", "message": "503 rows are too many"}, "handler"),
        ({"type": "MemoryError", "message": ""}, "limit"),
    ],
)
def test_whose_an_error_probably_is_by_its_type_and_status(error, whose):
    why = why_run(run("failed", "error", error=error))

    assert (why.whose, why.probably) == (whose, True)
    assert "probably" in (clauses(why).whose or "")


@pytest.mark.parametrize(
    ("code", "whose"),
    [("credentials_rejected", "org"), ("issuer_unavailable", "provider"), ("issuer_paused", "provider")],
)
def test_whose_it_is_that_there_is_no_token(code, whose):
    why = why_run(run("waiting", "no_token", detail=f"{code}: issuer main says so"))

    assert (why.whose, why.probably) == (whose, False)


EARLIER = AT.replace(hour=2)


@pytest.mark.parametrize(
    ("since_then", "says"),
    [
        (SinceThen(AT, 1, {"succeeded": 7}), "7 later runs succeeded"),
        (SinceThen(AT, 1, {"succeeded": 1}), "1 later run succeeded"),
        (SinceThen(EARLIER, 3, {"failed": 9}), "all 12 runs since 2030-01-01T02:00:00.000000Z failed"),
        (SinceThen(AT, 1, {"failed": 2, "succeeded": 7}), "of 9 later runs 7 succeeded and 2 did not"),
        (SinceThen(AT, 1, {"refused": 2}), "2 later runs were refused"),
        (SinceThen(AT, 1, {}), "no later run has ended"),
        (
            SinceThen(EARLIER, 3, {}),
            "3 runs in a row ended like this since 2030-01-01T02:00:00.000000Z; no later run has ended",
        ),
        (SinceThen(AT, 1, {"succeeded": 1000}, more=True), "at least 1,000 later runs succeeded"),
    ],
)
def test_it_says_what_came_since(since_then, says):
    why = why_run(run("failed", "error"), since_then=since_then)

    assert clauses(why).since_then == says
    assert why.since == since_then.since
    assert row_of(why)["later_runs"] == dict(since_then.later)


def test_the_customer_is_told_of_the_success_that_came_since():
    failed = run("failed", "error")
    after = clauses(why_run(failed, since_then=SinceThen(AT, 1, {"succeeded": 2}))).customer
    retried = clauses(why_run(failed, retried={"id": "r2", "state": "succeeded"})).customer

    assert after.endswith("It has run successfully since then.")
    assert retried.endswith("It was run again and has succeeded.")
    assert clauses(why_run(failed)).customer == (
        "The job digest, planned for 2030-01-01T03:00:00.000000Z, did not run to its end, "
        "because of an error on our side. We are looking into it."
    )
