"""What the API answers, with types: a run, and the start of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from .errors import BadAnswer

ENDED = ("succeeded", "failed", "cancelled", "refused", "skipped")
Replayed = Literal["same", "other"]


@dataclass(frozen=True, slots=True)
class Run:
    """A run as the API shows it; `row` has all of its keys.

    `state` is waiting, running, or one of ENDED; `reason` says why. Times are aware. `result` is what the
    handler returned, `error` has `type` and `message`, `progress` has `done`, `total` and `note`.
    """

    id: str
    org: str
    definition: str
    state: str
    reason: str | None
    detail: str | None
    attempt: int
    available_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    progress: Any
    result: Any
    error: Mapping[str, Any] | None
    row: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def succeeded(self) -> bool:
        return self.state == "succeeded"


@dataclass(frozen=True, slots=True)
class Started:
    """The run of a key. `replayed` is None for a new run; `other` if the key's run has other params."""

    run: Run
    key: str
    replayed: Replayed | None = None


def run_of(row: Any) -> Run:
    """The run in an answer; raises BadAnswer for another shape."""
    if not isinstance(row, Mapping):
        raise _wrong("it is not an object")
    error = row.get("error")
    if error is not None and not isinstance(error, Mapping):
        raise _wrong("error is not an object")
    attempt = row.get("attempt")
    if attempt is not None and (isinstance(attempt, bool) or not isinstance(attempt, int)):
        raise _wrong("attempt is not a number")
    return Run(
        id=_text(row, "id"),
        org=_text(row, "org"),
        definition=_text(row, "definition"),
        state=_text(row, "state"),
        reason=_text_or_none(row, "reason"),
        detail=_text_or_none(row, "detail"),
        attempt=attempt or 0,
        available_at=_time(row, "available_at"),
        started_at=_time(row, "started_at"),
        finished_at=_time(row, "finished_at"),
        progress=row.get("progress"),
        result=row.get("result"),
        error=error,
        row=row,
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise _wrong(f"{name} is not a text")
    return value


def _text_or_none(row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) is None else _text(row, name)


def _time(row: Mapping[str, Any], name: str) -> datetime | None:
    text = _text_or_none(row, name)
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise _wrong(f"{name} is not a time")
    return found


def _wrong(what: str) -> BadAnswer:
    return BadAnswer(f"the answer is not a run: {what}", fix="check the address of the API")
