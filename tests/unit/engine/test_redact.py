"""What a handler leaves in its outcome is without the secrets that this process knows."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker.engine.attempt.run_log import redacted
from worker.ids import OrgId
from worker.model.runs.outcome import (
    Cancelled,
    Error,
    Failed,
    HandedBack,
    NoToken,
    Outcome,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
    TimedOut,
)
from worker.telemetry.masking import masker

SECRET = "canary-5ecret-0123456789"
ERROR = Error(SECRET, f"got {SECRET}", f"line: {SECRET}")


@pytest.mark.parametrize(
    "said",
    [
        Succeeded(f'{{"x":"{SECRET}"}}'),
        Succeeded("1", f'{{"key":"{SECRET}"}}'),
        Failed(ERROR),
        TimedOut(ERROR),
        Cancelled("by_handler", SECRET),
        Refused("settings_invalid", "max_tokens", f"{SECRET} is no number"),
        Retried(None, SECRET),
        Snoozed(timedelta(1), SECRET),
        NoToken(timedelta(1), SECRET),
    ],
)
async def test_no_known_secret_leaves_in_an_outcome(said: Outcome) -> None:
    masker.register(SECRET)

    clean = await redacted(said, OrgId("acme"))

    assert "canary" not in repr(clean)
    assert type(clean) is type(said)


async def test_an_outcome_without_texts_stays_as_it_is() -> None:
    assert await redacted(HandedBack(), OrgId("acme")) == HandedBack()
    assert await redacted(Succeeded(None), OrgId("acme")) == Succeeded(None)
