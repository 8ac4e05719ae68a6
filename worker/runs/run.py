"""Run: one instant of one definition, as it moves from fire to admission."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from worker.definitions.policies import Overlap
from worker.ids import DefinitionId, OrgId, RunId

Origin = Literal["schedule", "manual", "backfill", "retry"]
Isolation = Literal["child", "inline"]
FinalState = Literal["succeeded", "failed", "cancelled", "refused", "skipped"]
WaitingReason = Literal[
    "due", "held", "retry", "snoozed", "handed_back", "recovered", "no_token", "no_handler"
]
FINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "refused", "skipped"})


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to be inserted, as fire and run-now make it. Instants are aware UTC.

    `serial` runs of a definition are on one at a time; `overlap` says what becomes of one that meets another.
    """

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    revision: int
    handler: str
    origin: Origin
    scheduled_for: datetime
    available_at: datetime
    idempotency_key: str
    isolation: Isolation = "child"
    serial: bool = True
    overlap: Overlap = "skip"
    priority: int = 0
    variant_handlers: tuple[str, ...] = ()
    max_concurrent: int | None = None
    start_by: datetime | None = None
    request_key: str | None = None
    backfill_id: str | None = None
    retry_of: RunId | None = None
    created_by: str | None = None
    params: Mapping[str, Any] | None = None


@dataclass(slots=True)
class AdmittedRun:
    """A run that this incarnation owns, under one fencing token. Never changed.

    `attempt` counts from 1; `failures` are the earlier attempts that count against
    `max_attempts`; `recoveries` the times its worker was lost since the last
    checkpoint that moved.
    """

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    revision: int
    handler: str
    isolation: Isolation
    origin: Origin
    scheduled_for: datetime
    available_at: datetime
    start_by: datetime | None
    started_at: datetime
    attempt: int
    failures: int
    recoveries: int
    fencing_token: int
    idempotency_key: str
    params: Mapping[str, Any] | None

    @property
    def may_have_checkpoint(self) -> bool:
        """A first attempt has none, unless its run takes up another's."""
        return self.attempt > 1 or self.origin == "retry"


@dataclass(frozen=True, slots=True)
class OwnedRun:
    """What a renewal says of a run this incarnation owns; `cancel_reason` asks it to stop."""

    id: RunId
    fencing_token: int
    cancel_reason: str | None


@dataclass(frozen=True, slots=True)
class RunContext:
    """What an attempt needs to know of its run's org and definition; `spec` is the run's revision."""

    org_id: OrgId
    org_code: str
    org_name: str
    org_timezone: str | None
    issuer: str
    definition_name: str
    spec: Mapping[str, Any]
