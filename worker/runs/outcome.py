"""How an attempt ends, and what that makes of its run.

An attempt yields one `Outcome`; `retry.settle` turns it into an `EndedAttempt`,
which is all that the finisher writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from worker.definitions.policies import RetryPolicy
from worker.ids import DefinitionId, OrgId, RunId
from worker.runs.run import AdmittedRun


@dataclass(frozen=True, slots=True)
class Error:
    """What went wrong: the exception's type, its message, the handler's trace."""

    type: str
    message: str
    trace: str = ""

    def as_json(self) -> dict[str, str]:
        return {"type": self.type, "message": self.message} | ({"trace": self.trace} if self.trace else {})


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The handler returned; `result` is JSON text of at most 1 MiB, or None."""

    result: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler did not manage. `reason` is error, handler_exited, result_invalid, out_of_memory."""

    error: Error
    reason: str = "error"
    detail: str | None = None
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The run's timeout passed before the handler returned."""

    error: Error


@dataclass(frozen=True, slots=True)
class Retried:
    """The handler asked for another try after a while; it counts against `max_attempts`."""

    after: timedelta | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The handler asked to be called again later; nothing is counted."""

    after: timedelta
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Ended on request. `reason` is requested, suspended, replaced, closed or by_handler."""

    reason: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class HandedBack:
    """Interrupted by a drain or by a reconciliation: the run waits again, nothing is counted."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """Its worker or zygote died under it."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A token or claims that do not allow it. `reason` as in the run's reasons of refused."""

    reason: str
    detail: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class NoToken:
    """No token, or no verdict on one, yet; try again after `retry_after`."""

    retry_after: timedelta
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class NoHandler:
    """The handler is not offered here, or not in this isolation, any more."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Gated:
    """A feature flag or the start deadline says no. `reason` is flag_off or expired."""

    reason: str
    detail: str | None = None


Outcome = (
    Succeeded
    | Failed
    | TimedOut
    | Retried
    | Snoozed
    | Cancelled
    | HandedBack
    | Lost
    | Refused
    | NoToken
    | NoHandler
    | Gated
)


@dataclass(slots=True)
class Trail:
    """What an attempt leaves behind besides its outcome, filled in as it goes."""

    handler: str
    token_ready_at: datetime | None = None
    handler_started_at: datetime | None = None
    claims: Mapping[str, Any] | None = None
    flags: Mapping[str, Any] | None = None
    jti: str | None = None
    claims_hash: str | None = None
    progress: Mapping[str, Any] | None = None
    peak_memory: int | None = None


# To freeze one of so many fields takes three times as long as to make it, for every run.
@dataclass(slots=True)
class EndedAttempt:
    """One row of `attempts` and what becomes of its run, as the finisher writes it.

    `state` is a final state, or `waiting` with `reason` and `available_after` (from
    the database's time of the write; None means at once). `failures` and
    `recoveries` are the run's new counts. `result` and `error` are ready for JSON
    columns (`result` as JSON text). `keep_start_by` is true while the handler has
    never started.
    """

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    fencing_token: int
    attempt: int
    started_at: datetime
    ended_at: datetime
    outcome: str
    state: str
    reason: str | None
    trail: Trail
    detail: str | None = None
    available_after: timedelta | None = None
    failures: int = 0
    recoveries: int = 0
    keep_start_by: bool = False
    result: str | None = None
    error: Mapping[str, str] | None = field(default=None)
    error_cause: str | None = None


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
