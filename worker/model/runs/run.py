"""Run: the data of due definitions, runs, skips and run logs, as the loops and the store exchange them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions import Overlap
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.prices import ModelUsage

Origin = Literal["schedule", "manual", "backfill", "retry", "child"]
Isolation = Literal["child", "inline"]
SkipReason = Literal["missed", "overlap", "calendar"]

# How far ahead the start of a run may be put off, by the API and by SQL, and what both say beyond it.
MAX_AHEAD = timedelta(days=30)
TOO_FAR_AHEAD = f"not_before is over {MAX_AHEAD.days} days ahead"
START_LATER = "start it later"


@dataclass(frozen=True, slots=True)
class Declared:
    """Where a handler asks to run, as `@job` says; an unknown one in a child process, in any pool.

    `on_hosts` are the isolations that hosts declare of it, by pool: for runs that are in that pool already.
    """

    isolation: Isolation = "child"
    pool: str | None = None
    on_hosts: Mapping[str, Isolation] = field(default_factory=dict)

    def isolation_in(self, pool: str) -> Isolation:
        """The isolation of a run in this pool whose definition does not set one."""
        return self.on_hosts.get(pool, self.isolation)


# Not frozen: to make one would take three times as long, and that for each run.
@dataclass(slots=True)
class NewRun:
    """A run to insert. Never changed. Times are aware and in UTC.

    `serial` runs of a definition run one at a time; `overlap` decides what happens to one that is due
    while another is unfinished.
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
    pool: str = DEFAULT_POOL
    # When it was asked for; None: as it is inserted.
    created_at: datetime | None = None


@dataclass(slots=True)
class AdmittedRun:
    """A run that this incarnation owns, under one fencing token. Never changed.

    `attempt` starts at 1. `failures` are the earlier attempts that count against `max_attempts`,
    `recoveries` the losses of its worker since the last checkpoint that changed. `parent_id` is the run that
    started a child.
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
    pool: str = DEFAULT_POOL
    parent_id: RunId | None = field(default=None, metadata={"sent": False})

    @property
    def may_have_checkpoint(self) -> bool:
        """False for a first attempt, unless the run continues another one."""
        return self.attempt > 1 or self.origin == "retry"


@dataclass(frozen=True, slots=True)
class LoadedState:
    """A definition's state as one attempt loads it; `commits`: a success of this run may change it.

    Backfills and retries of their runs only read it.
    """

    value: Mapping[str, Any]
    commits: bool


@dataclass(frozen=True, slots=True)
class StoredProgress:
    """What earlier attempts of a run stored: the last checkpoint, and by which handler; None if nothing."""

    checkpoint: Any = None
    handler: str | None = None


@dataclass(frozen=True, slots=True)
class OwnedRun:
    """A run of this incarnation as a renewal returns it; with `cancel_reason` it must stop."""

    id: RunId
    fencing_token: int
    cancel_reason: str | None


class RunContext(NamedTuple):
    """The org and the definition of a run; `spec`, of the run's revision, and `tags` are JSON text."""

    org_id: OrgId
    org_code: str
    org_name: str
    org_timezone: str | None
    issuer: str
    definition_name: str
    spec: str
    tags: str = "[]"


@dataclass(slots=True)
class DueDefinition:
    """A definition whose next fire time has come, locked by this transaction. Never changed."""

    definition_id: DefinitionId
    org_id: OrgId
    org_code: str
    org_timezone: str | None
    name: str
    revision: int
    next_scheduled_for: datetime
    spec: Mapping[str, Any]
    org_pool: str | None = None


@dataclass(frozen=True, slots=True)
class Upcoming:
    """A definition that is due next at `next_fire_at`; `spec` is the JSON text of its revision."""

    definition_id: DefinitionId
    org_id: OrgId
    org_code: str
    issuer: str
    next_fire_at: datetime
    spec: str
    next_scheduled_for: datetime | None = None
    org_timezone: str | None = None


@dataclass(frozen=True, slots=True)
class NewSkip:
    """Consecutive scheduled times that do not become runs; both ends inclusive, within one UTC day."""

    org_id: OrgId
    definition_id: DefinitionId
    revision: int
    skipped_from: datetime
    skipped_until: datetime
    count: int
    reason: SkipReason


class NextFire(NamedTuple):
    """When a definition is due next; both are None if never."""

    definition_id: DefinitionId
    next_scheduled_for: datetime | None
    next_fire_at: datetime | None


class NewDeadline(NamedTuple):
    """The time by which a scheduled time and those before it must be done."""

    definition_id: DefinitionId
    org_id: OrgId
    scheduled_for: datetime
    deadline_at: datetime


class Decision(NamedTuple):
    """What to insert for one due definition."""

    runs: Sequence[NewRun]
    skips: Sequence[NewSkip]
    next: NextFire
    deadlines: Sequence[NewDeadline] = ()


@dataclass(frozen=True, slots=True)
class FireReport:
    """The result of one call of fire; `more` is true if it reached its limit."""

    inserted: Sequence[NewRun] = ()
    overlapped: Sequence[NewRun] = ()
    skips: Sequence[NewSkip] = ()
    next_fire_at: datetime | None = None
    now: datetime | None = None
    more: bool = False


@dataclass(frozen=True, slots=True)
class Swept:
    """A waiting run that a sweep ended; `org` and `definition` are names, None if that row was deleted."""

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    org: str | None
    definition: str | None
    attempt: int
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class MadeRuns:
    """What one step made of starts: the number of `runs` that wait, and the runs that were `refused`.

    `passed` is the definition after which the next step goes on, None after the last one. `unreadable` are
    the definitions that this release cannot read, with org, name and error: their starts stay.
    """

    runs: int = 0
    refused: Sequence[Swept] = ()
    passed: DefinitionId | None = None
    unreadable: Mapping[DefinitionId, tuple[str, str, str]] = field(default_factory=dict)

    @property
    def made(self) -> int:
        return self.runs + len(self.refused)


@dataclass(frozen=True, slots=True)
class Recovered:
    """A run taken over from a dead worker: `state` is waiting, or failed after `max_recoveries`.

    `org` is the org's code, `definition` the definition's name; None if that row was deleted.
    """

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    org: str | None
    definition: str | None
    attempt: int
    worker: str
    state: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a run log; `seq` counts from 1 in each attempt, `source` is log, stdout, stderr or worker."""

    run_id: RunId
    attempt: int
    seq: int
    org_id: OrgId
    at: datetime
    level: str
    source: str
    text: str


def step_label(name: str, key: str | None, occurrence: int) -> str:
    """A step for people: `ask`, `ask#2` for its second use, `ask[key]`."""
    shown = "" if key is None else f"[{key}]"
    return f"{name}{shown}" + (f"#{occurrence}" if occurrence > 1 else "")


# Not frozen: a run may have thousands.
@dataclass(slots=True)
class NewStep:
    """The result of a step to store: `seq` counts from 1 in its run, `spends` are meters and amounts.

    `used` is what its requests to models used; its tokens are in `spends` as well.
    """

    name: str
    key: str | None
    occurrence: int
    seq: int
    result_json: str
    started_at: datetime
    ended_at: datetime
    spends: tuple[tuple[str, int], ...] = ()
    used: tuple[ModelUsage, ...] = ()


@dataclass(slots=True)
class RunStep:
    """A step of a running run, as it is stored: by which handler, and the bytes of its result."""

    run: AdmittedRun
    handler: str
    step: NewStep
    size: int

    @property
    def what(self) -> str:
        """The step for people."""
        return f"step {self.step.name}"


@dataclass(slots=True)
class StoredStep:
    """A stored step as a later attempt needs it; `size` is that of the result in bytes."""

    seq: int
    name: str
    key: str | None
    occurrence: int
    size: int
    result_json: str


@dataclass(frozen=True, slots=True)
class StepPage:
    """Stored steps of a run in the order of `seq`; `more` if there may be others after them."""

    steps: Sequence[StoredStep] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class StoredSkip:
    """The last row of a definition in `skips`."""

    id: str
    skip: NewSkip


def fold(
    skips: Iterable[NewSkip],
    last: Mapping[DefinitionId, StoredSkip],
    ran_before: Mapping[tuple[DefinitionId, datetime], datetime | None],
) -> tuple[list[StoredSkip], list[NewSkip]]:
    """Extend the last row of each definition where possible; returns extended and new rows.

    A row can be extended if reason, revision and UTC day are the same and no scheduled run lies in
    between. `ran_before` has, for a definition and the start of a skip, the last scheduled time before
    it that became a run.
    """
    open_rows: dict[DefinitionId, StoredSkip | NewSkip] = dict(last)
    grown: dict[DefinitionId, StoredSkip] = {}
    new: list[NewSkip] = []
    for skip in sorted(skips, key=lambda skip: (skip.definition_id, skip.skipped_from)):
        row = open_rows.get(skip.definition_id)
        so_far = row.skip if isinstance(row, StoredSkip) else row
        ran_at = ran_before.get((skip.definition_id, skip.skipped_from))
        if so_far is None or not _continues(so_far, skip, ran_at):
            open_rows[skip.definition_id] = skip
            new.append(skip)
            continue
        longer = replace(so_far, skipped_until=skip.skipped_until, count=so_far.count + skip.count)
        if isinstance(row, StoredSkip):
            open_rows[skip.definition_id] = grown[skip.definition_id] = StoredSkip(row.id, longer)
        else:
            open_rows[skip.definition_id] = longer
            new[new.index(so_far)] = longer
    return list(grown.values()), new


def _continues(row: NewSkip, skip: NewSkip, ran_at: datetime | None) -> bool:
    return (
        row.reason == skip.reason
        and row.revision == skip.revision
        and row.skipped_until < skip.skipped_from
        and row.skipped_from.astimezone(UTC).date() == skip.skipped_until.astimezone(UTC).date()
        and (ran_at is None or ran_at <= row.skipped_until)
    )
