"""Waits: what a run waits for without a process, as handler, worker and store exchange it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from worker.model.batches import NewRequest
from worker.model.runs.children import ChildrenWait

WaitKind = Literal["sleep", "answer", "budget", "children", "batch"]
KINDS: tuple[WaitKind, ...] = get_args(WaitKind)

# Names that begin so are those of budgets.
BUDGET = "budget:"
# Those of limits of other services.
LIMIT = "limit:"
# Those of children.
CHILDREN = "children:"
# Those of model requests in batches.
BATCH = "batch:"
# Waits of one run.
MAX_WAITS = 10_000
# Bytes of JSON text in UTF-8: what a handler asks, with its options, and an answer.
MAX_ASKED = 16 * 1024
MAX_ANSWERED = 64 * 1024
# Answers to waits that a run has not reached yet.
MAX_EARLY = 100
# Answers that one wait can be limited to.
MAX_OPTIONS = 50

Option = str | int | float | bool | None


def is_open_question(wait: Mapping[str, Any]) -> bool:
    """Whether somebody can answer this wait, a row of `runs show`, now: no sleep, not answered, not over."""
    asks = wait["kind"] == "answer" or (wait["kind"] == "budget" and wait["ask"] is not None)
    return asks and wait["answered_at"] is None and wait["timed_out_at"] is None


def check_options(options: object) -> tuple[Option, ...]:
    """The answers that a wait is limited to. Raises ValueError."""
    if not isinstance(options, list | tuple) or not 1 <= len(options) <= MAX_OPTIONS:
        raise ValueError(f"give a list of 1 to {MAX_OPTIONS}")
    for place, option in enumerate(options):
        if not (option is None or isinstance(option, str | int | float)):
            raise ValueError(f"number {place + 1} is not a text, a number, true, false or null")
        if is_option(options[:place], option):
            raise ValueError(f"number {place + 1} is there twice")
    return tuple(options)


def is_option(options: Sequence[Option], answer: object) -> bool:
    """Whether an answer is one of these, by its JSON value: `true` is not `1`, but `1.0` is."""
    return any(
        isinstance(option, bool) == isinstance(answer, bool) and option == answer for option in options
    )


def is_allowed(wait: Mapping[str, Any], answer: object) -> bool:
    """Whether a wait, a row of `runs show`, takes this answer."""
    return wait["options"] is None or is_option(wait["options"], answer)


@dataclass(frozen=True, slots=True)
class NewWait:
    """A wait of one attempt. `seconds` is the time until its deadline, None for no deadline.

    `ask_json` is what people are asked, as JSON text. With `alert` an alert fires while it is open. With
    `options` no other answer is taken. `children` are those that it waits for, `request` is
    that of a wait for a batch.
    """

    name: str
    occurrence: int
    kind: WaitKind
    seconds: float | None = None
    ask_json: str | None = None
    alert: bool = False
    options: tuple[Option, ...] = ()
    children: ChildrenWait | None = None
    request: NewRequest | None = None


def options_text(wait: NewWait) -> str | None:
    """The options of a wait as JSON text; None if it takes any answer."""
    return json.dumps(wait.options) if wait.options else None


@dataclass(frozen=True, slots=True)
class WaitState:
    """How a wait stands: answered, with `answer_json`; over, when its deadline has passed; or pending.

    With `too_many` the run has `MAX_WAITS` others, and this one is not stored. `kind` is the stored one:
    it differs from the asked one if the handler's code has changed.
    """

    kind: WaitKind
    state: Literal["answered", "over", "pending", "too_many"]
    answer_json: str | None = None
    until: datetime | None = None
