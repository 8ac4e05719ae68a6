"""The rows of lists.

The class of a row declares its columns, their order, and how an org's own token sees each (`redaction`).
The classes `…Detail` are for the verb `show`.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from worker.ids import DefinitionId, OrgId, RunId, TemplateId, WorkerId
from worker.model.definitions.budgets import MONEY
from worker.model.orgs import OrgState
from worker.store import redaction
from worker.store.redaction import Shown, Spec

Json = Any


class CredentialRow(TypedDict):
    """A generation of an org's client credentials, without its secret."""

    id: Shown[str]
    org: Shown[str]
    generation: Shown[int]
    client_id: Shown[str]
    kind: Shown[str]
    reference: Annotated[str | None, redaction.reference]
    key_id: Annotated[str | None, redaction.hidden]
    state: Shown[str]
    created_at: Shown[datetime]
    created_by: Annotated[str, redaction.actor]
    retired_at: Shown[datetime | None]
    last_used_at: Shown[datetime | None]
    uses: Shown[int]
    last_error: Annotated[str | None, redaction.text]


class SecretRow(TypedDict):
    """A secret of an org, without its value; for operators only."""

    id: str
    org: str
    name: str
    origin: str | None
    header: str | None
    generation: int
    key_id: str
    created_at: datetime
    created_by: str
    rotated_at: datetime | None
    rotated_by: str | None


class OrgRow(TypedDict):
    id: Shown[OrgId]
    code: Shown[str]
    name: Shown[str]
    issuer: Shown[str]
    state: Shown[OrgState]
    state_by: Annotated[str | None, redaction.actor]
    state_at: Shown[datetime | None]
    state_note: Annotated[str | None, redaction.note_of("state_by")]
    max_concurrent_runs: Shown[int]
    weight: Shown[int]
    tags: Shown[list[str]]
    timezone: Shown[str | None]
    pool: Shown[str | None]
    created_at: Shown[datetime]
    updated_at: Shown[datetime]


class OrgDetail(OrgRow):
    credentials: Annotated[list[CredentialRow], redaction.rows(CredentialRow)]


class DefinitionRow(TypedDict):
    """What an org asked for; `timezone` and `pool` are those in force.

    `late_since` is the first deadline that passed, of a definition that is late.
    """

    id: Shown[DefinitionId]
    org: Shown[str]
    name: Shown[str]
    handler: Shown[str]
    schedule: Shown[str]
    timezone: Shown[str]
    calendar: Shown[str | None]
    pool: Shown[str]
    reveal_token: Shown[bool]
    state: Shown[str]
    org_state: Shown[OrgState]
    next_scheduled_for: Shown[datetime | None]
    next_fire_at: Shown[datetime | None]
    late_since: Shown[datetime | None]
    revision: Shown[int]
    enabled: Shown[bool]
    paused_at: Shown[datetime | None]
    paused_by: Annotated[str | None, redaction.actor]
    pause_note: Annotated[str | None, redaction.note_of("paused_by")]
    consecutive_failures: Shown[int]
    template: Shown[str | None]
    created_at: Shown[datetime]
    updated_at: Shown[datetime]
    closed_at: Shown[datetime | None]


class DefinitionDetail(DefinitionRow):
    """`next_run_for` is the next scheduled time that is not on a date of the calendar."""

    next_run_for: Shown[datetime | None]
    schedule_in_words: Shown[str]
    spec: Spec


class Template(TypedDict):
    """One definition for many orgs. Which orgs, and how many, is for operators only.

    `definitions` is how many open definitions it made, one an org; at most 10,000 are counted.
    `orgs_done` of `orgs_total` orgs, selected or not, have been compared with its last change.
    """

    id: Shown[TemplateId]
    name: Shown[str]
    orgs: Json
    definitions: int
    handler: Shown[str]
    schedule: Shown[str]
    state: Shown[str]
    revision: Shown[int]
    orgs_done: int
    orgs_total: int
    materialised_at: Shown[datetime | None]
    created_at: Shown[datetime]
    updated_at: Shown[datetime]
    updated_by: str
    closed_at: Shown[datetime | None]


class TemplateDetail(Template):
    spec: Spec


class Calendar(TypedDict):
    """Dates on which nothing runs, for all orgs; for operators only."""

    id: str
    name: str
    days: int
    first_date: date | None
    last_date: date | None
    created_at: datetime
    updated_at: datetime
    updated_by: str


class CalendarDetail(Calendar):
    """`definitions` is how many open definitions name it, `templates` which open templates do."""

    dates: list[str]
    definitions: int
    templates: list[str]


class LimitRow(TypedDict):
    """A limit of calls to a service, for operators only."""

    id: str
    origin: str
    per: str
    rate: str | None
    burst: int | None
    concurrent: int | None
    max_wait: str
    created_at: datetime
    updated_at: datetime
    updated_by: str


class ModelBatch(TypedDict):
    """A batch of model requests at a provider, for operators only."""

    id: str
    pool: str
    api: str
    model: str
    state: str
    requests: int
    late: int
    tries: int
    provider_id: str | None
    created_at: datetime
    sent_at: datetime | None
    ended_at: datetime | None
    error: str | None


class LimitDetail(LimitRow):
    """`orgs` is how many have a bucket now, `used` the buckets whose requests wait or are under way."""

    orgs: int
    used: list[LimitUse]
    pauses: list[OriginPause]


class LimitUse(TypedDict):
    """What all workers use of a limit now: of an org, or of all orgs together."""

    org: str | None
    tokens: float
    waiting: int
    slots: int


class OriginPause(TypedDict):
    """An org whose requests to the service pause until then, as it asked."""

    org: str
    until: datetime


class RolloutRow(TypedDict):
    """A rollout of a new version, for operators only."""

    id: str
    name: str
    definitions: str
    from_handler: str
    to_handler: str
    orgs: Any
    flag: Any
    steps: list[str]
    auto: bool
    watch: dict[str, str]
    state: str
    step: int
    step_began_at: datetime | None
    began_at: datetime | None
    ready: bool
    stalled: bool
    judged_at: datetime | None
    halted_at: datetime | None
    halted_by: str | None
    reason: str | None
    created_at: datetime
    updated_at: datetime
    updated_by: str


class RolloutDetail(RolloutRow):
    """`metrics` are the numbers of the last verdict, `evidence` those of the last halt by a metric."""

    share: str | None
    orgs_in_all: int
    orgs_moved: int
    moved: list[dict[str, Any]]
    metrics: dict[str, Any] | None
    evidence: dict[str, Any] | None
    days: list[dict[str, Any]]


class PlannedStepRow(TypedDict):
    """A step before it starts; `days` is null if it never shows what it must within a year."""

    step: str
    orgs: int
    runs_per_day: float
    runs: int | None
    days: int | None
    note: str


class AttemptRow(TypedDict):
    attempt: Shown[int]
    worker: Annotated[WorkerId | None, redaction.hidden]
    fencing_token: Shown[int]
    handler: Shown[str]
    started_at: Shown[datetime]
    token_ready_at: Shown[datetime | None]
    handler_started_at: Shown[datetime | None]
    ended_at: Shown[datetime | None]
    outcome: Shown[str | None]
    error: Annotated[Json, redaction.error]
    error_cause: Annotated[str | None, redaction.error_cause]


class StepRow(TypedDict):
    """A stored step; `result` is null if the results of newer steps take the room.

    `spends` is what it spent, by meter.
    """

    seq: Shown[int]
    name: Shown[str]
    key: Shown[str | None]
    occurrence: Shown[int]
    attempt: Shown[int]
    handler: Shown[str]
    started_at: Shown[datetime]
    ended_at: Shown[datetime]
    size: Shown[int]
    result: Shown[Json]
    spends: Annotated[dict[str, int], redaction.without_key(MONEY)]


class Spent(TypedDict):
    """What a run spent of a meter, in how many spends."""

    meter: Shown[str]
    amount: Shown[int]
    spends: Shown[int]


class EgressTotals(TypedDict):
    """What a run sent to one origin; `denied` requests were not sent, `waited_seconds` waited for a limit."""

    origin: Shown[str]
    requests: Shown[int]
    bytes_out: Shown[int]
    bytes_in: Shown[int]
    statuses: Shown[dict[str, int]]
    denied: Shown[int]
    waited_seconds: Shown[float]


class Children(TypedDict):
    """The runs that a run started: how many there are, have ended and failed, and the first that failed."""

    total: Shown[int]
    ended: Shown[int]
    failed: Shown[int]
    states: Shown[dict[str, int]]
    failed_runs: Shown[list[RunId]]


class WaitRow(TypedDict):
    """What a run waits for, or has waited for: a sleep, or an answer."""

    name: Shown[str]
    occurrence: Shown[int]
    kind: Shown[str]
    ask: Shown[Json]
    options: Shown[list[Any] | None]
    refused: Shown[Json]
    opened_at: Shown[datetime | None]
    until: Shown[datetime | None]
    answered_at: Shown[datetime | None]
    answered_by: Annotated[str | None, redaction.actor]
    answer: Shown[Json]
    timed_out_at: Shown[datetime | None]


class Run(TypedDict):
    """One scheduled time of one definition, and its outcome."""

    id: Shown[RunId]
    org: Shown[str]
    definition: Shown[str]
    handler: Shown[str]
    pool: Shown[str]
    revision: Shown[int]
    scheduled_for: Shown[datetime]
    origin: Shown[str]
    retry_of: Shown[RunId | None]
    retried_as: Shown[RunId | None]
    state: Shown[str]
    reason: Shown[str | None]
    detail: Annotated[str | None, redaction.detail]
    available_at: Shown[datetime | None]
    attempt: Shown[int]
    fencing_token: Shown[int | None]
    result_fencing_token: Shown[int | None]
    worker: Annotated[WorkerId | None, redaction.hidden]
    started_at: Shown[datetime | None]
    finished_at: Shown[datetime | None]
    progress: Shown[Json]
    result: Shown[Json]
    error: Annotated[Json, redaction.error]


class RunDetail(Run):
    created_at: Shown[datetime]
    created_by: Annotated[str | None, redaction.actor]
    request_key: Shown[str | None]
    idempotency_key: Shown[str]
    params: Annotated[Json, redaction.by_hand]
    cancel_requested_at: Shown[datetime | None]
    claims: Annotated[Json, redaction.claims]
    attempts: Annotated[list[AttemptRow], redaction.rows(AttemptRow)]
    waits: Annotated[list[WaitRow], redaction.rows(WaitRow)]
    checkpoint: Shown[Json]
    step_count: Shown[int]
    steps: Annotated[list[StepRow], redaction.rows(StepRow)]
    spends: Annotated[list[Spent], redaction.rows(Spent, without=("meter", MONEY))]
    egress: Annotated[list[EgressTotals], redaction.rows(EgressTotals)]
    parent: Shown[RunId | None]
    children: Shown[Children | None]
    spec: Spec


class Explanation(TypedDict):
    """Why a run has its state: data first, then the same in words. `next` is a command."""

    run: Shown[RunId | None]
    org: Shown[str]
    definition: Shown[str]
    scheduled_for: Shown[datetime]
    state: Shown[str | None]
    reason: Shown[str | None]
    retried_as: Shown[RunId | None]
    other_orgs: Annotated[int | None, redaction.hidden]
    kind: Shown[str]
    whose: Shown[str | None]
    probably: Shown[bool]
    since: Shown[datetime | None]
    later_runs: Shown[Json]
    questions: Shown[Json]
    verb: Shown[str]
    subject: Annotated[Json, redaction.hidden]
    what: Shown[str]
    cause: Annotated[str, redaction.text]
    since_then: Shown[str | None]
    others: Annotated[str | None, redaction.hidden]
    kept: Shown[str]
    retry: Shown[str]
    customer: Shown[str]
    next: Annotated[str | None, redaction.hidden]
    sentence: Annotated[str | None, redaction.hidden]


class LogRow(TypedDict):
    """A line that a run logged or printed, or by which a worker says why an attempt was lost."""

    attempt: Shown[int]
    seq: Shown[int]
    at: Shown[datetime]
    level: Shown[str]
    source: Shown[str]
    text: Annotated[str, redaction.line]


class Skip(TypedDict):
    """Consecutive scheduled times that never became a run, both ends included."""

    id: Shown[str]
    org: Shown[str]
    definition: Shown[str]
    revision: Shown[int]
    skipped_from: Shown[datetime]
    skipped_until: Shown[datetime]
    count: Shown[int]
    reason: Shown[str]


class Handler(TypedDict):
    """`source` says whether workers offer it, in any pool, or hosts of the pool `pool` declare it."""

    name: Shown[str]
    source: Shown[Literal["worker", "host"]]
    distribution: Shown[str]
    version: Shown[str]
    entry_point: Shown[str]
    isolation: Shown[str]
    scopes: Shown[list[str]]
    params_schema: Shown[Json]
    settings_schema: Shown[Json]
    timeout: Shown[str | None]
    max_attempts: Shown[int | None]
    memory: Shown[str | None]
    max_concurrent: Shown[int | None]
    state: Shown[bool]
    pool: Shown[str | None]
    secrets: Shown[list[str]]
    description: Annotated[str | None, redaction.text]
    egress: Shown[list[str] | None]
    audiences: Shown[list[str]]
    children: Shown[list[str]]
    error: Annotated[str | None, redaction.not_loaded]
    seen_at: Shown[datetime]


class ChangeRow(TypedDict):
    """A row of the audit: who changed what."""

    id: Shown[str]
    at: Shown[datetime]
    actor: Annotated[str, redaction.actor]
    action: Shown[str]
    org: Shown[str | None]
    subject: Shown[str]
    detail: Annotated[Json, redaction.audit_detail]


class Backfill(TypedDict):
    """A range of the past that runs again; for operators only."""

    id: str
    org: str
    definition: str
    range_from: datetime
    range_until: datetime
    state: str
    instants: int
    made: int
    ended: int
    limit: int
    revision: int
    created_at: datetime
    created_by: str
    finished_at: datetime | None


class PlannedBackfill(TypedDict):
    """What a backfill of a range would do; for operators only.

    `instants` is the number of scheduled times, `made` how many of them a backfill of this
    range has run already, `id` that backfill if there is one.
    """

    id: str | None
    org: str
    definition: str
    range_from: datetime
    range_until: datetime
    instants: int
    made: int
    first: datetime | None
    last: datetime | None
    limit: int
    revision: int


class BulkRow(TypedDict):
    """A run that a bulk change has passed: `left` says why it was left as it is."""

    id: Shown[RunId]
    org: Shown[str]
    definition: Shown[str]
    scheduled_for: Shown[datetime]
    state: Shown[str]
    retried_as: Shown[RunId | None]
    left: Annotated[str | None, redaction.text]


class ChangeOutcome(TypedDict):
    """What became of a run, or an org's definition, in a change of many; for operators only.

    `left` says why it was left as it is, else it is null.
    """

    id: str | None
    org: str
    definition: str
    left: str | None
    scheduled_for: NotRequired[datetime]
    state: NotRequired[str | None]
    retry_of: NotRequired[str]
    name: NotRequired[str]
    occurrence: NotRequired[int | None]
    instants: NotRequired[int]
    made: NotRequired[int]


class Bulk(TypedDict):
    """What a bulk change has done; `next` continues it."""

    dry_run: Shown[bool]
    canary: Shown[int | None]
    runs: Annotated[list[BulkRow], redaction.rows(BulkRow)]
    next: Shown[str | None]


def columns_of(kind: type) -> tuple[str, ...]:
    """The columns of a row, in their order."""
    return tuple(kind.__annotations__)
