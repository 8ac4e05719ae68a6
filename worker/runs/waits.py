"""Waits: what a run waits for without a process, as handler, worker and store exchange it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

WaitKind = Literal["sleep", "answer", "budget"]
KINDS: tuple[WaitKind, ...] = get_args(WaitKind)

# Waits of one run.
MOST_WAITS = 10_000
# Bytes of JSON text in UTF-8: what a handler asks, and an answer.
MOST_ASKED = 16 * 1024
MOST_ANSWERED = 64 * 1024
# Answers to waits that a run has not reached yet.
MOST_EARLY = 100


def is_open_question(wait: Mapping[str, Any]) -> bool:
    """Whether somebody can answer this wait, a row of `runs show`, now: no sleep, not answered, not over."""
    asks = wait["kind"] == "answer" or (wait["kind"] == "budget" and wait["ask"] is not None)
    return asks and wait["answered_at"] is None and wait["timed_out_at"] is None


@dataclass(frozen=True, slots=True)
class NewWait:
    """A wait of one attempt. `seconds` is the time until its deadline, None for no deadline.

    `ask_json` is what people are asked, as JSON text. With `alert` an alert fires while it is open.
    """

    name: str
    occurrence: int
    kind: WaitKind
    seconds: float | None = None
    ask_json: str | None = None
    alert: bool = False


@dataclass(frozen=True, slots=True)
class WaitState:
    """How a wait stands: answered, with `answer_json`; over, when its deadline has passed; or pending.

    With `too_many` the run has `MOST_WAITS` others, and this one is not stored. `kind` is the stored one:
    it differs from the asked one if the handler's code has changed.
    """

    kind: WaitKind
    state: Literal["answered", "over", "pending", "too_many"]
    answer_json: str | None = None
    until: datetime | None = None
