"""Values in forms: as text that people edit, and back; and the reason of a change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from worker.errors import UsageError, WorkerError
from worker.features.console.pages.rendering import fix_of
from worker.kit.web.responses import status_of
from worker.model.definitions.units import plain_json

MAX_REASON = 500
# How numbers, quoted strings, lists and objects begin.
_STARTS = tuple('"[{-0123456789')


def reason_of(form: Mapping[str, str], name: str = "reason") -> str | None:
    """The reason or note that somebody gave for a change; None without one.

    Raises:
        UsageError: it is longer than its field allows.
    """
    text = form.get(name, "").strip()
    if len(text) > MAX_REASON:
        raise UsageError(f"the {name} is longer than {MAX_REASON} characters", fix="shorten it")
    return text or None


def problem_of(problem: WorkerError | None) -> dict[str, Any]:
    """What a page shows after a change that was refused, and its status."""
    if problem is None:
        return {"problem": None}
    message = f"{problem.message[:1].upper()}{problem.message[1:].rstrip('.')}."
    shown = " ".join(filter(None, (message, fix_of(problem.fix))))
    return {"problem": shown, "status": status_of(problem)}


def as_text(value: Any) -> str:
    """A value as people type it: text as it is, anything else as JSON; empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if from_typed(value) != value else value
    return json.dumps(value, ensure_ascii=False)


def from_typed(text: str) -> Any:
    """The value of a typed text: JSON if it is JSON, else the text; None for nothing."""
    text = text.strip()
    if text in ("", "true", "false", "null"):
        return {"true": True, "false": False}.get(text)
    if not text.startswith(_STARTS):
        return text
    try:
        return plain_json(text)
    except (ValueError, RecursionError):
        return text


def from_json(text: str, name: str) -> Any:
    """The value of a field that is JSON, as the page wrote it.

    Raises:
        UsageError: it is not JSON, or nests too deeply; the message names the field.
    """
    try:
        return plain_json(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{name} is not JSON", fix="open the page again and use its buttons") from None
