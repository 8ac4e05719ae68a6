"""The answer about a run in the console's terms, and the lanes of its attempts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import START
from worker.features.console.pages.runs import MAX_LANES, StepLink, answer, lanes_of
from worker.model.runs.causes import CAUSES
from worker.model.runs.why import why_run

RUN = "01900000-0000-7000-8000-000000000001"
OTHER = "01900000-0000-7000-8000-000000000002"


def row(state: str, reason: str | None, **values: Any) -> dict[str, Any]:
    run = {
        "id": RUN, "org": "org a", "definition": "my digest", "handler": "acme.digest", "state": state,
        "reason": reason, "detail": "x", "error": None, "attempt": 1, "scheduled_for": START,
        "available_at": START, "worker": OTHER, "started_at": START, "checkpoint": None, "attempts": [],
        "created_at": START, "retried_as": None, "pool": "eu",
    }  # fmt: skip
    return run | values


@pytest.mark.parametrize(("state", "reason"), CAUSES)
def test_every_state_has_sentences_without_commands_and_a_step_to_a_page(state: str, reason: str | None):
    found = answer(why_run(row(state, reason)), row(state, reason))

    assert found.lead.startswith(f"{state.capitalize()} at attempt 1: ")
    for sentence in filter(None, (found.lead, found.whose, found.kept, found.retry)):
        assert sentence.endswith(".")
        assert "`" not in sentence
        assert "runs retry" not in sentence
    if found.step is not None:
        assert found.step.href.startswith(("/", "#"))
        assert " " not in found.step.href
    assert OTHER not in found.lead


def test_a_secret_that_is_missing_and_a_budget_have_a_step_on_the_console():
    missing = answer(why_run(row("refused", "secret_missing")), row("refused", "secret_missing"))
    budget = answer(why_run(row("waiting", "budget")), row("waiting", "budget"))

    assert missing.step == StepLink("Open the org that lacks the secret", "/orgs/org%20a")
    assert budget.step == StepLink("See the org's budgets", "/usage?org=org%20a")


def test_a_step_on_the_runs_own_page_is_a_part_of_it():
    failed = row("failed", "error")

    assert answer(why_run(failed), failed).step == StepLink("Retry it", "#retry", "retry")
    assert answer(why_run(row("waiting", "snoozed")), row("waiting", "snoozed")).step is None


def attempt(number: int, start: float, **seconds: float | None) -> dict[str, Any]:
    marks = {"token_ready_at": None, "handler_started_at": None, "ended_at": None, **seconds}
    at = {name: None if value is None else START + timedelta(seconds=value) for name, value in marks.items()}
    started = START + timedelta(seconds=start)
    return {"attempt": number, "started_at": started, "outcome": "failed" if at["ended_at"] else None, **at}


def lengths(run: dict[str, Any], now: float) -> list[list[tuple[str, float]]]:
    lanes = lanes_of(run, START + timedelta(seconds=now))
    return [[(one.name, (one.end - one.start).total_seconds()) for one in lane.pieces] for lane in lanes]


def test_an_attempt_waits_gets_its_token_starts_and_runs():
    run = row("running", None)
    run["attempts"] = [
        attempt(1, 10, token_ready_at=12, handler_started_at=13, ended_at=20),
        attempt(2, 50, token_ready_at=None, ended_at=51),
        attempt(3, 60),
    ]

    assert lengths(run, 70) == [
        [("waiting", 10), ("token", 2), ("starting", 1), ("running", 7)],
        [("waiting", 30), ("token", 1)],
        [("waiting", 9), ("running", 10)],
    ]


def test_a_waiting_run_has_a_lane_of_its_own_and_old_attempts_are_left_out():
    run = row("waiting", "no_token")
    run["attempts"] = [attempt(n, n, ended_at=n + 0.5) for n in range(1, 101)]
    lanes = lanes_of(run, START + timedelta(seconds=200))

    assert len(lanes) == MAX_LANES
    assert (lanes[-1].name, lanes[-1].note) == ("Now", "no token")
    assert lengths(row("waiting", "due"), 5) == [[("waiting", 5)]]
    assert lengths(row("cancelled", "requested"), 5) == []
