"""The demo's lines: one for what happened to a run, in words, and not one for each of many alike."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.demo.journal import HEAD, QUIET, WIDTH, Quiet, RunChange, advice_on, line, words_of
from worker.model.search import REASONS

AT = datetime(2030, 1, 1, 9, 7, 13, tzinfo=UTC)
RUN = "01a22bc8-b44c-765d-9469-11f105793048"
ASK = {"text": "Refund 40 EUR to Ada?", "options": ["yes", "no"]}


def change(state: str, reason: str | None = None, detail: str | None = None, **values: Any) -> RunChange:
    return RunChange(RUN, values.pop("attempt", 1), "org_acme", "refund", state, reason, detail, **values)


KEY_ERROR = {"type": "KeyError", "message": "'name'"}


@pytest.mark.parametrize("state", ["waiting", "succeeded", "failed", "cancelled", "refused", "skipped"])
def test_each_state_and_reason_has_words(state: str):
    """Words without a gap: no braces of JSON, no None."""
    told = {reason: words_of(change(state, reason)) for reason in (None, *REASONS)}

    assert not {
        reason: words
        for reason, words in told.items()
        if words and (set(words) & set("{}_") or "None" in words)
    }
    assert {reason for reason, words in told.items() if not words} <= {"due", "held"}


def test_a_line_is_plain_and_fits():
    text = line(AT, change("failed"), "failed: \x1b[31mred\nand a long story " + "x" * 200)

    assert text.startswith("09:07:13  org_acme      refund          failed: ?[31mred and")
    assert len(text) == WIDTH
    assert text.endswith("…")
    assert HEAD.index("what happened") == text.index("failed")


def of_other_run(happened: RunChange, run: str) -> RunChange:
    return replace(happened, run=run)


def test_successes_that_repeat_are_summed_up():
    quiet, ended = Quiet(), change("succeeded", took=1.0)

    told = [quiet.words_of(of_other_run(ended, str(n)), n * QUIET / 4) for n in range(5)]

    assert told == ["succeeded in 1.0 s", None, None, None, "succeeded in 1.0 s (+3 before)"]


def test_another_error_of_the_same_definition_has_its_line():
    quiet = Quiet()
    first = change("failed", "error", error=KEY_ERROR)
    other = change("failed", "error", error={"type": "ValueError"})

    assert quiet.words_of(first, 0.0) is not None
    assert quiet.words_of(first, 0.1) is None
    assert quiet.words_of(other, 0.2) == "failed: ValueError"


def test_what_people_are_asked_and_what_comes_of_it_is_never_left_out():
    quiet = Quiet()
    asked, resumed = change("waiting", "answer", ask=ASK), change("waiting", "resumed", answered_by="a")
    ended = change("succeeded", took=0.1)
    quiet.words_of(of_other_run(ended, "other"), 0.0)

    for run in ("1", "2"):
        told = [quiet.words_of(of_other_run(each, run), 0.1) for each in (asked, resumed, ended)]
        assert None not in told
    assert quiet.words_of(of_other_run(ended, "other"), 0.2) is None


def test_the_advice_names_the_page_and_a_command():
    at = {"console": "http://127.0.0.1:8470", "command": "/tmp/demo/orgworker"}

    asked = advice_on(change("waiting", "answer", "approval", ask=ASK), **at)
    spent = advice_on(change("waiting", "budget", "letters"), **at)

    assert asked == (
        f"answer it: http://127.0.0.1:8470/runs/{RUN}, or",
        "/tmp/demo/orgworker runs answer 01a22bc8-b44c…3048 approval --data '\"yes\"'",
    )
    assert spent == (
        "raise it: http://127.0.0.1:8470/usage?org=org_acme, or",
        "/tmp/demo/orgworker budgets raise org_acme letters --by 100",
    )
    assert advice_on(change("succeeded"), **at) == ()


def test_an_option_cannot_leave_its_place_in_the_command(monkeypatch: pytest.MonkeyPatch):
    """The text of a question comes from a handler; the reader copies the command into a shell."""
    asked = change("waiting", "answer", "$(echo out)", ask={"options": ["'; echo out; '"]})

    def printed() -> str:
        _, command = advice_on(asked, console="", command="echo")
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False).stdout

    assert printed() == "runs answer 01a22bc8-b44c…3048 $(echo out) --data \"'; echo out; '\"\n"
    monkeypatch.setattr("worker.demo.journal.shlex.quote", lambda text: text)
    assert "approval out" in printed().replace("3048", "approval")
