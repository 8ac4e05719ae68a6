"""What comes out of a handler, whatever it is, is an outcome."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from worker.errors import CredentialsRejected, IssuerUnavailable, LeaseLost, Throttled
from worker.handlers.calling import error_of, outcome_of, outcome_of_error
from worker.handlers.json_text import clean, to_json_text
from worker.handlers.models import HandlerMissing, ParamsInvalid, SettingsInvalid
from worker.handlers.results import Cancel, HandBack, PermanentError, Retry, Snooze
from worker.model.runs.outcome import (
    Cancelled,
    Failed,
    HandedBack,
    Lost,
    NoHandler,
    NoToken,
    Outcome,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (None, Succeeded(None)),
        ({"a": [1, "é"]}, Succeeded('{"a":[1,"é"]}')),
        (Retry(), Retried(None)),
        (Retry("90s", "busy"), Retried(timedelta(seconds=90), "busy")),
        (Retry(timedelta(minutes=1)), Retried(timedelta(minutes=1))),
        (Snooze(1.5), Snoozed(timedelta(seconds=1.5))),
        (Cancel("org is closed"), Cancelled("by_handler", "org is closed")),
        (HandBack(), HandedBack()),
    ],
)
def test_an_answer_becomes_its_outcome(answer: Any, outcome: Outcome) -> None:
    assert outcome_of(answer) == outcome


@pytest.mark.parametrize("answer", [Retry("soon"), Snooze(-1), Snooze("x"), Retry(float("nan"))])
def test_an_answer_with_a_bad_duration_is_an_invalid_result(answer: Any) -> None:
    outcome = outcome_of(answer)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "result_invalid"


@pytest.mark.parametrize(
    ("error", "kind", "fields"),
    [
        (ValueError("x"), Failed, {"reason": "error", "permanent": False}),
        (PermanentError("x"), Failed, {"permanent": True}),
        (ParamsInvalid("x"), Failed, {"permanent": True}),
        (MemoryError(), Failed, {"reason": "out_of_memory"}),
        (SettingsInvalid("max_tokens", "m"), Refused, {"reason": "settings_invalid", "detail": "max_tokens"}),
        (HandlerMissing("x"), NoHandler, {"detail": "x"}),
        (LeaseLost("x"), Lost, {}),
        (IssuerUnavailable("x"), NoToken, {"detail": "issuer_unavailable"}),
        (CredentialsRejected("x"), NoToken, {"detail": "credentials_rejected"}),
        (Throttled("x", retry_after=7), NoToken, {"retry_after": timedelta(seconds=7)}),
    ],
)
def test_an_exception_becomes_its_outcome(
    error: BaseException, kind: type[Outcome], fields: dict[str, Any]
) -> None:
    outcome = outcome_of_error(error)

    assert isinstance(outcome, kind)
    for name, value in fields.items():
        assert getattr(outcome, name) == value


def test_an_error_is_cut_to_size_and_cleaned() -> None:
    def fail() -> None:
        raise ValueError("x\0\ud800" + "y" * 50_000)

    try:
        fail()
    except ValueError as caught:
        error = error_of(caught)

    assert error.type == "ValueError"
    assert error.message.startswith("x�?")
    assert len(error.message) == 50_003  # it is not masked yet
    assert "in fail" in error.trace


def test_an_error_says_from_which_module_its_type_comes() -> None:
    assert error_of(PermanentError("x")).type == "worker.handlers.results.PermanentError"


@pytest.mark.parametrize("text", ["\\u0000", "\\\\u0000", "a\\\\\\u0000"])
def test_only_a_real_nul_is_refused(text: str) -> None:
    assert to_json_text(text, "result")


def test_text_for_people_is_cut_with_a_mark() -> None:
    assert clean("abcdef", 4) == "abc…"
    assert clean("abcd", 4) == "abcd"
