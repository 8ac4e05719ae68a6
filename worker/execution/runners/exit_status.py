"""Exit status: how a run's process ended, and the outcome that follows."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from worker.execution.runners.child.main import CHANNEL_CLOSED
from worker.execution.runners.contract import StopSignal, stopped
from worker.runs.outcome import (
    Cancelled,
    Error,
    Failed,
    Lost,
    Outcome,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
)

_LOST = {"lost": "the process that forked it is gone", "frozen": "frozen for longer than max_freeze"}


@dataclass(frozen=True, slots=True)
class Ended:
    """What the zygote reports of a process; `why` says that it killed the run itself, and for what."""

    status: int = 0
    memory: int = 0
    why: str | None = None
    detail: str | None = None


def outcome_of_end(
    said: Outcome | None, ended: Ended, stop: StopSignal, *, memory: int | None = None
) -> Outcome:
    """The outcome of an attempt whose process is gone.

    `said` is what the process itself sent, if it came to that; `memory` the cap in bytes.
    """
    if stop.killed:
        return Lost("the lease on the run is lost")
    if said is not None:
        return after_stop(said, stop)
    if ended.why == "out_of_memory":
        cap = f" of {memory // (1024 * 1024)} MiB" if memory else ""
        return Failed(Error("OutOfMemory", f"the run used more than its cap{cap}"), "out_of_memory")
    if stop.reason is not None:
        return stopped(stop)
    if ended.why in _LOST:
        return Lost(_LOST[ended.why])
    return _exited(exit_detail(ended.status))


def after_stop(said: Outcome, stop: StopSignal) -> Outcome:
    """What a handler answers once it was asked to stop counts where it has really come to an end.

    An error may come from the interruption, and to wait again is an answer to a drain only.
    """
    if stop.reason is None:
        return said
    match said:
        case Succeeded() | Cancelled() | Refused():
            return said
        case Failed(permanent=True):
            return said
        case Retried() | Snoozed() if stop.reason == "drain":
            return said
        case _:
            return stopped(stop)


def exited(code: int) -> Failed:
    """The outcome of a handler that has called `sys.exit` inline."""
    return _exited(f"exit code {code}")


def exit_detail(status: int) -> str:
    """`exit code 3`, `signal SIGSEGV`: a wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code == CHANNEL_CLOSED:
        return "its channel to the worker was closed"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _exited(detail: str) -> Failed:
    error = Error("HandlerExited", f"the handler ended without a result: {detail}")
    return Failed(error, "handler_exited", detail)
