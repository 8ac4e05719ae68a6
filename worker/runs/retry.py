"""Retry: (policy, run, outcome) -> when it is tried next, or how it has ended. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

from worker.definitions.policies import RetryPolicy
from worker.runs.outcome import (
    Cancelled,
    EndedAttempt,
    Error,
    Failed,
    Gated,
    HandedBack,
    Lost,
    NoHandler,
    NoToken,
    Outcome,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
    TimedOut,
    Trail,
)
from worker.runs.run import AdmittedRun

# A try more would only repeat the effects: the handler returned, its result cannot be kept.
NEVER_RETRIED = frozenset({"result_invalid", "result_unstorable"})
# How long a run waits whose handler went away between admission and start.
NO_HANDLER_WAIT = timedelta(seconds=5)


class Random(Protocol):
    """The part of `random.Random` that a delay needs."""

    def uniform(self, a: float, b: float) -> float: ...


@dataclass(slots=True)
class _Settled:
    """What becomes of the attempt (`outcome`) and of its run (the rest)."""

    outcome: str
    state: str
    reason: str | None = None
    detail: str | None = None
    after: timedelta | None = None
    error: Error | None = None
    result: str | None = None
    counts: bool = False
    recoveries: int | None = None


def settle(
    run: AdmittedRun,
    outcome: Outcome,
    trail: Trail,
    policy: RetryPolicy,
    *,
    now: datetime,
    random: Random,
) -> EndedAttempt:
    """What the finisher writes of an attempt that ended with `outcome` at `now`.

    Failed, timed-out and retried attempts count against `max_attempts`, lost ones
    against `max_recoveries`, all others against nothing. `run.recoveries` must be 0
    where this attempt has saved a checkpoint that moved.
    """
    settled = _settle(run, outcome, policy, random)
    error = settled.error
    return EndedAttempt(
        run_id=run.id,
        org_id=run.org_id,
        definition_id=run.definition_id,
        fencing_token=run.fencing_token,
        attempt=run.attempt,
        started_at=run.started_at,
        ended_at=now,
        outcome=settled.outcome,
        state=settled.state,
        reason=settled.reason,
        trail=trail,
        detail=settled.detail,
        available_after=settled.after,
        failures=run.failures + settled.counts,
        recoveries=run.recoveries if settled.recoveries is None else settled.recoveries,
        keep_start_by=trail.handler_started_at is None,
        result=settled.result,
        error=error.as_json() if error else None,
        error_cause=fingerprint(error) if error else None,
    )


def backoff(policy: RetryPolicy, failures: int, random: Random) -> timedelta:
    """The delay after the `failures`th failure: a random part of the first delay doubled each time."""
    longest = policy.backoff.total_seconds() * 2.0 ** min(failures - 1, 60)
    return timedelta(seconds=random.uniform(0.0, min(longest, policy.backoff_max.total_seconds())))


def fingerprint(error: Error) -> str:
    """The cause of an error: the same for errors that differ only in numbers, ids or quoted texts."""
    message = error.message.split("\n", 1)[0]
    for pattern, stand_in in _VARIABLE:
        message = pattern.sub(stand_in, message)
    return f"{error.type}: {message}"[:200]


_VARIABLE = (
    (re.compile(r"https?://\S+"), "<url>"),
    (re.compile(r"(?<!\w)'[^']*'|\"[^\"]*\""), "<text>"),
    (re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"), "<id>"),
    (re.compile(r"\b(?:0x)?(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{8,}\b"), "<id>"),
    # An underscore within a word, and a digit after it; each part ends where the next begins.
    (re.compile(r"\b\w[^\W_]*_[^\W\d]*\d\w*\b"), "<id>"),
    (re.compile(r"\d+(?:\.\d+)?"), "<n>"),
)


def _settle(run: AdmittedRun, outcome: Outcome, policy: RetryPolicy, random: Random) -> _Settled:
    match outcome:
        case Succeeded(result):
            return _Settled("succeeded", "succeeded", result=result)
        case Failed(error, reason, detail, permanent):
            failed = _Settled("failed", "failed", reason, detail, error=error, counts=True)
            if permanent or reason in NEVER_RETRIED:
                return failed
            return _tried_again(failed, run, policy, None, random)
        case TimedOut(error):
            failed = _Settled("timed_out", "failed", "timed_out", error=error, counts=True)
            return _tried_again(failed, run, policy, None, random)
        case Retried(after, detail):
            error = Error("Retry", detail or "the handler asked for another try")
            failed = _Settled("retry", "failed", "error", detail, error=error, counts=True)
            return _tried_again(failed, run, policy, after, random)
        case Lost(detail):
            return _lost(run, policy, detail)
        case Snoozed(after, detail):
            return _Settled("snoozed", "waiting", "snoozed", detail, after)
        case HandedBack(detail):
            return _Settled("handed_back", "waiting", "handed_back", detail)
        case NoToken(retry_after, detail):
            return _Settled("no_token", "waiting", "no_token", detail, retry_after)
        case NoHandler(detail):
            return _Settled("handed_back", "waiting", "no_handler", detail, NO_HANDLER_WAIT)
        case Cancelled(reason, detail):
            return _Settled("cancelled", "cancelled", reason, detail)
        case Refused(reason, detail, message):
            error = Error("Refused", message or ": ".join(filter(None, (reason, detail))))
            return _Settled("refused", "refused", reason, detail, error=error)
        case Gated(reason, detail):
            return _Settled("gated", "skipped", reason, detail)


def _tried_again(
    failed: _Settled, run: AdmittedRun, policy: RetryPolicy, after: timedelta | None, random: Random
) -> _Settled:
    failures = run.failures + 1
    if failures >= policy.max_attempts:
        return failed
    delay = backoff(policy, failures, random) if after is None else after
    return replace(failed, state="waiting", reason="retry", after=delay)


def _lost(run: AdmittedRun, policy: RetryPolicy, detail: str | None) -> _Settled:
    recoveries = run.recoveries + 1
    if recoveries > policy.max_recoveries:
        error = Error("Lost", f"its worker was lost {recoveries} times without a new checkpoint")
        return _Settled("lost", "failed", "lost", detail, error=error, recoveries=recoveries)
    return _Settled("lost", "waiting", "recovered", detail, recoveries=recoveries)
