"""Wire calls: what a running attempt on a host asks of the workers, as JSON; see `wire.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.clock import from_text, to_text
from worker.execution.hosts.wire import (
    count_in,
    fence_message,
    fence_of,
    progress_in,
    reader,
    rows_in,
    text_in,
)
from worker.execution.runners.child import messages
from worker.execution.runners.child.messages import Message
from worker.execution.runners.output import LINE_LIMIT
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.steps import MOST_STEPS, StepError
from worker.ids import RunId
from worker.runs.run import AdmittedRun, LogLine, NewStep
from worker.runs.waits import NewWait
from worker.runs.worker_ends import LOST_LINE

# The number of the last line of a log, which is the worker's own. Those of hosts are lower, also than that of
# the line that says why an attempt was lost.
LAST_LINE = 2**31 - 1
LEVELS = ("debug", "info", "warning", "error", "critical")
SOURCES = ("log", "stdout", "stderr")
_SPEND_KEY = re.compile(r"[1-9][0-9]*:([1-9][0-9]*)")


@reader
def checkpoint_of(message: Mapping[str, Any]) -> tuple[str, int]:
    """A checkpoint's JSON text, and which save of the attempt it is; 0 if the host does not say."""
    data = message["data"]
    if not isinstance(data, str):
        raise ValueError("data is not JSON text")
    check_json_text(data, "checkpoint")
    return data, count_in(message.get("number", 0), "number", 2**31 - 1)


@reader
def handler_of(message: Mapping[str, Any]) -> str:
    return text_in(message, "handler")


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step of one of a host's runs."""

    run_id: RunId
    fencing_token: int
    handler: str
    step: NewStep


def step_message(run: AdmittedRun, handler: str, step: NewStep) -> Message:
    return fence_message(run) | {"handler": handler, "step": messages.step_message(step)}


@reader
def steps_of(message: Mapping[str, Any]) -> list[SentStep]:
    try:
        return [
            SentStep(*fence_of(row), handler_of(row), messages.step_of(row["step"]))
            for row in rows_in(message, "steps")
        ]
    except StepError as error:
        raise ValueError(str(error)) from error


@reader
def after_of(message: Mapping[str, Any]) -> int:
    """The place after which a host reads the steps of a run."""
    return count_in(message.get("after", 0), "after", MOST_STEPS)


def wait_message(wait: NewWait) -> Message:
    return {"wait": messages.wait_message(wait)}


@reader
def wait_of(message: Mapping[str, Any]) -> NewWait:
    try:
        return messages.wait_of(message["wait"])
    except StepError as error:
        raise ValueError(str(error)) from error


@reader
def spend_of(message: Mapping[str, Any]) -> tuple[str, int, str]:
    """A meter, an amount, and the key of the spend: `attempt:number`."""
    key = text_in(message, "key")
    # One number has one form: each key counts once.
    if (found := _SPEND_KEY.fullmatch(key)) is None:
        raise ValueError("key is not attempt:number, such as 1:25")
    try:
        meter, amount, _ = messages.spend_of({**message, "number": int(found[1])})
    except StepError as error:
        raise ValueError(str(error)) from error
    return meter, amount, key


def line_message(line: LogLine, fencing_token: int) -> Message:
    return {
        "run": line.run_id,
        "fencing_token": fencing_token,
        "seq": line.seq,
        "at": to_text(line.at),
        "level": line.level,
        "source": line.source,
        "text": line.text,
    }


@dataclass(frozen=True, slots=True)
class LineRow:
    """A line of the log of one of a host's runs; `at` is by the host's clock."""

    run_id: RunId
    fencing_token: int
    seq: int
    at: datetime
    level: str
    source: str
    text: str


@reader
def lines_of(message: Mapping[str, Any]) -> list[LineRow]:
    return [_line(row) for row in rows_in(message, "lines")]


def _line(row: Mapping[str, Any]) -> LineRow:
    level, source = row["level"], row["source"]
    if level not in LEVELS or source not in SOURCES:
        raise ValueError(f"level or source of line {row['seq']}")
    return LineRow(
        *fence_of(row),
        seq=count_in(row["seq"], "seq", LOST_LINE - 1),
        at=from_text(row["at"]),
        level=level,
        source=source,
        text=clean(row["text"], LINE_LIMIT),
    )


def progress_message(run_id: RunId, fencing_token: int, progress: Mapping[str, Any]) -> Message:
    return {"run": run_id, "fencing_token": fencing_token, "progress": dict(progress)}


@reader
def progress_of(message: Mapping[str, Any]) -> list[tuple[RunId, int, Mapping[str, Any]]]:
    return [(*fence_of(row), progress_in(row["progress"])) for row in rows_in(message, "rows")]
