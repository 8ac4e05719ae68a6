"""How an attempt ends, and what that makes of its run.

An attempt yields one `Outcome`; `retry.settle` turns it into an `EndedAttempt`,
which is all that the finisher writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from worker.ids import DefinitionId, OrgId, RunId


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
