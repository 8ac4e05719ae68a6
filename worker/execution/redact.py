"""Redact: whatever a handler left in its outcome, without the secrets and tokens this process knows."""

from __future__ import annotations

from dataclasses import fields, replace

from worker.runs.outcome import Error, Outcome, Succeeded
from worker.telemetry.masking import masker

NOTHING_SAID = Succeeded()


def redacted(outcome: Outcome) -> Outcome:
    """The same outcome with every text of it masked: result, detail, message, error and trace."""
    if outcome == NOTHING_SAID:
        return outcome
    changes: dict[str, str | Error] = {}
    for field in fields(outcome):
        value = getattr(outcome, field.name)
        if isinstance(value, str):
            changes[field.name] = masker.mask(value)
        elif isinstance(value, Error):
            changes[field.name] = Error(*map(masker.mask, (value.type, value.message, value.trace)))
    return replace(outcome, **changes) if changes else outcome  # type: ignore[arg-type]
