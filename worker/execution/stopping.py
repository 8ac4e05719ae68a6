"""What a run comes to that was asked to stop and did not end by itself."""

from __future__ import annotations

from worker.execution.work import Stop
from worker.runs.outcome import Cancelled, Error, HandedBack, Lost, Outcome, TimedOut


def stopped(stop: Stop) -> Outcome:
    """The outcome that a stop's reason means."""
    match stop.reason:
        case None:
            return Lost("no longer ours")
        case "timeout":
            return TimedOut(Error("TimeoutError", "the run's timeout passed before its handler returned"))
        case "drain":
            return HandedBack()
        case "cancel":
            return Cancelled("requested")
        case reason:
            return Cancelled(reason)
