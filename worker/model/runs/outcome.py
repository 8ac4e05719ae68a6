"""Outcome: how an attempt ends, and what happens to its run: final, or retried later. Pure.

An attempt has one `Outcome`; `end_attempt` turns it into the `EndedAttempt` that the finisher writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions import RetryPolicy
from worker.model.runs.egress import EgressRow
from worker.model.runs.run import AdmittedRun


@dataclass(frozen=True, slots=True)
class Error:
    """An exception: type, message, and the trace within the handler."""

    type: str
    message: str
    trace: str = ""

    def as_json(self) -> dict[str, str]:
        return {"type": self.type, "message": self.message} | ({"trace": self.trace} if self.trace else {})


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The handler returned; `result` is JSON text of at most 1 MiB, or None.

    `state` is the JSON text of the definition's new state, or None if it did not change.
    """

    result: str | None = None
    state: str | None = None


# Of nearly all runs.
SUCCEEDED = Succeeded()


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed. `reason` is error, handler_exited, result_invalid, out_of_memory or budget."""

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
    """The handler asked for a retry; counts against `max_attempts`."""

    after: timedelta | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The handler asked to be called again later; not counted."""

    after: timedelta
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Ended on request. `reason` is requested, suspended, replaced, closed, parent or by_handler."""

    reason: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class HandedBack:
    """Interrupted by a drain or by reconciliation: the run waits again; not counted."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker or the zygote died during the attempt."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The token or its claims do not allow the run. `reason` is one of the reasons of refused runs."""

    reason: str
    detail: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class NoToken:
    """No token yet, or it could not be verified yet; retried after `retry_after`."""

    retry_after: timedelta
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class NoHandler:
    """This worker no longer offers the handler, or not in this isolation."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class NotApproved:
    """The host declares more of the handler than it may get in its pool; `detail` is the command for it."""

    detail: str


@dataclass(frozen=True, slots=True)
class Gated:
    """A feature flag or the start deadline prevents the run. `reason` is flag_off or expired."""

    reason: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Parked:
    """The handler waits without a process. `reason` is asleep, answer, budget, children or batch; `detail`
    names the waits.
    """

    reason: str
    detail: str | None = None


PARKED_REASONS = ("asleep", "answer", "budget", "children", "batch")

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
    | NotApproved
    | Gated
    | Parked
)


@dataclass(slots=True)
class Trail:
    """What an attempt records besides its outcome, filled in as it proceeds."""

    handler: str
    token_ready_at: datetime | None = None
    handler_started_at: datetime | None = None
    # JSON text, shared by all runs of a token.
    claims: str | None = None
    flags: str | None = None
    jti: str | None = None
    claims_hash: str | None = None
    progress: Mapping[str, Any] | None = None
    peak_memory: int | None = None
    # Open waits for which the handler asked for an alert: `approval`, `approval#2`.
    asks: tuple[str, ...] = ()
    # What was sent, by origin.
    egress: tuple[EgressRow, ...] = ()


# Not frozen: with this many fields that triples the cost of construction, for every run.
@dataclass(slots=True)
class EndedAttempt:
    """A row of `attempts`, and the new state of its run.

    `state` is final, or `waiting` with `reason` and `available_after` (from the database time of the
    write; None means at once), or `parked` with `reason` until one of its waits is over. `failures` and
    `recoveries` are the run's new counts. `result` is JSON text. `keep_start_by` is true if the handler
    has not started. With `counted` the parked run counts against the limits of definition and handler.
    `definition_state` is the JSON text that is committed with a success, or None. `is_child` if another run
    started the run; `has_children` if it may have started others.
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
    counted: bool = False
    result: str | None = None
    error: Mapping[str, str] | None = field(default=None)
    error_cause: str | None = None
    definition_state: str | None = None
    is_child: bool = False
    has_children: bool = False

    @property
    def final(self) -> bool:
        """Whether the run has ended with this attempt."""
        return self.state not in UNENDED

    @property
    def shown_state(self) -> str:
        """The state for people: a parked run is waiting."""
        return "waiting" if self.state == "parked" else self.state

    @property
    def seconds(self) -> float:
        """How long the attempt lasted, to the millisecond; 0 if the clock went back by more than that."""
        return max(0.0, round((self.ended_at - self.started_at).total_seconds(), 3))


# The states of a run that has another attempt.
UNENDED = frozenset({"waiting", "parked"})

# A retry would only repeat the effects: the handler returned, but its result cannot be stored.
NEVER_RETRIED = frozenset({"result_invalid", "result_unstorable"})
# Delay of a run whose handler was removed between admission and start.
NO_HANDLER_WAIT = timedelta(seconds=5)
# Of a run that an approval of its handler would let go on: that makes it due at once.
NOT_APPROVED_WAIT = timedelta(seconds=30)


def end_attempt(
    run: AdmittedRun,
    outcome: Outcome,
    trail: Trail,
    policy: RetryPolicy,
    *,
    now: datetime,
    random: Random,
    parked_counts: bool = False,
) -> EndedAttempt:
    """What the finisher writes for an attempt that ended with `outcome` at `now`.

    Failed, timed-out and retried attempts count against `max_attempts`, lost ones against
    `max_recoveries`, others are not counted. `run.recoveries` must be 0 if this attempt saved a
    checkpoint that changed. With `parked_counts` a parked run counts against limits.
    """

    def ended(
        outcome: str,
        state: str,
        reason: str | None = None,
        detail: str | None = None,
        after: timedelta | None = None,
        *,
        error: Error | None = None,
    ) -> EndedAttempt:
        return EndedAttempt(
            *(run.id, run.org_id, run.definition_id, run.fencing_token, run.attempt, run.started_at),
            now,
            outcome,
            state,
            reason,
            trail,
            detail,
            after,
            failures=run.failures,
            recoveries=run.recoveries,
            keep_start_by=trail.handler_started_at is None,
            error=error.as_json() if error else None,
            error_cause=fingerprint(error) if error else None,
            is_child=run.origin == "child",
        )

    def failed(attempt: EndedAttempt, *, after: timedelta | None = None, final: bool = False) -> EndedAttempt:
        attempt.failures += 1
        if not final and attempt.failures < policy.max_attempts:
            delay = backoff(policy, attempt.failures, random) if after is None else after
            attempt.state, attempt.reason, attempt.available_after = "waiting", "retry", delay
        return attempt

    match outcome:
        case Succeeded(result, state):
            succeeded = ended("succeeded", "succeeded")
            succeeded.result, succeeded.definition_state = result, state
            return succeeded
        case Failed(error, reason, detail, permanent):
            final = permanent or reason in NEVER_RETRIED
            return failed(ended("failed", "failed", reason, detail, error=error), final=final)
        case TimedOut(error):
            return failed(ended("timed_out", "failed", "timed_out", error=error))
        case Retried(after, detail):
            error = Error("Retry", detail or "the handler asked for a retry")
            return failed(ended("retry", "failed", "error", detail, error=error), after=after)
        case Lost(detail):
            recoveries = run.recoveries + 1
            if recoveries <= policy.max_recoveries:
                lost = ended("lost", "waiting", "recovered", detail)
            else:
                message = f"its worker was lost {recoveries} times without a new checkpoint"
                lost = ended("lost", "failed", "lost", detail, error=Error("Lost", message))
            lost.recoveries = recoveries
            return lost
        case Snoozed(after, detail):
            return ended("snoozed", "waiting", "snoozed", detail, after)
        case Parked(reason, detail):
            parked = ended("parked", "parked", reason, detail)
            # It got as far as a wait: earlier losses no longer count.
            parked.recoveries, parked.counted = 0, parked_counts
            return parked
        case HandedBack(detail):
            return ended("handed_back", "waiting", "handed_back", detail)
        case NoToken(retry_after, detail):
            return ended("no_token", "waiting", "no_token", detail, retry_after)
        case NoHandler(detail):
            return ended("handed_back", "waiting", "no_handler", detail, NO_HANDLER_WAIT)
        case NotApproved(detail):
            return ended("handed_back", "waiting", "not_approved", detail, NOT_APPROVED_WAIT)
        case Cancelled(reason, detail):
            return ended("cancelled", "cancelled", reason, detail)
        case Refused(reason, detail, message):
            error = Error("Refused", message or ": ".join(filter(None, (reason, detail))))
            return ended("refused", "refused", reason, detail, error=error)
        case Gated(reason, detail):
            return ended("gated", "skipped", reason, detail)


def backoff(policy: RetryPolicy, failures: int, random: Random) -> timedelta:
    """The delay after the `failures`th failure: random, below the first delay doubled for each failure."""
    longest = policy.backoff.total_seconds() * 2.0 ** min(failures - 1, 60)
    return timedelta(seconds=random.uniform(0.0, min(longest, policy.backoff_max.total_seconds())))


def fingerprint(error: Error) -> str:
    """The cause of an error: equal for errors that differ only in numbers, ids, URLs or quoted text."""
    return _without_variables(error.type, error.message.split("\n", 1)[0])


def summary(error: Mapping[str, str]) -> str:
    """An error for people, as one line: its cause, with the status of an HTTP response."""
    # The part that can be shown, with room for what is left out.
    message = _HTTPX.sub(r"\1\2", error["message"].split("\n", 1)[0][:1_000])
    message = _STATUS.sub(lambda found: found[0].translate(_KEPT), message)
    return _without_variables(error["type"], message).translate(_DIGITS)


def names_http_status(message: str) -> bool:
    """Whether the message of an error has the status of an HTTP response that is an error."""
    line = _HTTPX.sub(r"\1\2", message.split("\n", 1)[0][:1_000])
    return any(re.search(r"[45]\d\d", found[0]) for found in _STATUS.finditer(line))


def _without_variables(kind: str, message: str) -> str:
    for pattern, placeholder in _VARIABLE:
        message = pattern.sub(placeholder, message)
    return f"{kind}: {message}"[:200]


# Private characters for the digits of a status, which the patterns of variable parts do not match.
_KEPT = {ord("0") + digit: 0xE000 + digit for digit in range(10)}
_DIGITS = {kept: digit for digit, kept in _KEPT.items()}
# As httpx quotes it: Server error '503 Service Unavailable' for url 'https://…'.
_HTTPX = re.compile(r"\b((?:Client|Server) error )'([45]\d\d [A-Z][A-Za-z ]{1,40})'")
_STATUS = re.compile(
    r"\b(?:HTTP(?:/[\d.]{1,3})?|status(?:[ _]code)?|answer(?:s|ed)?|return(?:s|ed)"
    r"|respon(?:ds|ded|se)|replie[sd]|error)"
    r"(?: code| status)?(?: with)?[ :=(]{1,3}[1-5]\d\d\b(?![.\d])"
    r"|\b[45]\d\d (?:Client|Server) Error\b",
    re.IGNORECASE,
)
_VARIABLE = (
    # Not the quotes or brackets around it.
    (re.compile(r"https?://[^\s'\"<>()]+"), "<url>"),
    (re.compile(r"(?<!\w)'[^']*'|\"[^\"]*\""), "<text>"),
    (re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"), "<id>"),
    (re.compile(r"\b(?:0x)?(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{8,}\b"), "<id>"),
    # A word with an underscore and a later digit; the parts do not overlap.
    (re.compile(r"\b\w[^\W_]*_[^\W\d]*\d\w*\b"), "<id>"),
    (re.compile(r"\d+(?:\.\d+)?"), "<n>"),
)
