"""What can be listed, declared once for command line, JSON API, console and reference.

The class of a row declares its columns, their order, and how an org's own token sees each
(`redaction`); the classes `…Detail` are for the verb `show`. A `Listing` declares how its rows
can be narrowed. `read` and `runs` have the SQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypedDict, TypeVar, get_args
from uuid import UUID

from worker.errors import NotFound, UsageError
from worker.ids import ALL_ORGS, DefinitionId, OrgId, OrgScope, RunId, TemplateId, WorkerId
from worker.orgs import OrgState
from worker.store.lists import redaction
from worker.store.lists.redaction import Shown

if TYPE_CHECKING:
    from worker.search import Query

R = TypeVar("R")
Json = Any

DEFAULT_LIMIT = 50
MAX_LIMIT = 1000


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
    generation: int
    key_id: str
    created_at: datetime
    created_by: str
    rotated_at: datetime | None
    rotated_by: str | None


class Org(TypedDict):
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


class OrgDetail(Org):
    credentials: Annotated[list[CredentialRow], redaction.rows(CredentialRow)]


class Definition(TypedDict):
    """What an org asked for; `timezone` and `pool` are those in force."""

    id: Shown[DefinitionId]
    org: Shown[str]
    name: Shown[str]
    handler: Shown[str]
    schedule: Shown[str]
    timezone: Shown[str]
    calendar: Shown[str | None]
    pool: Shown[str]
    state: Shown[str]
    org_state: Shown[OrgState]
    next_scheduled_for: Shown[datetime | None]
    next_fire_at: Shown[datetime | None]
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


class DefinitionDetail(Definition):
    """`next_run_for` is the next scheduled time that is not on a date of the calendar."""

    next_run_for: Shown[datetime | None]
    schedule_in_words: Shown[str]
    spec: dict[str, Json]


class Template(TypedDict):
    """One definition for many orgs. Which orgs, and how many, is for operators only."""

    id: Shown[TemplateId]
    name: Shown[str]
    orgs: Json
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
    spec: dict[str, Json]


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


class Attempt(TypedDict):
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


class Step(TypedDict):
    """A stored step; `result` is null if the results of newer steps take the room."""

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


class Spent(TypedDict):
    """What a run spent of a meter, in how many spends."""

    meter: Shown[str]
    amount: Shown[int]
    spends: Shown[int]


class Wait(TypedDict):
    """What a run waits for, or has waited for: a sleep, or an answer."""

    name: Shown[str]
    occurrence: Shown[int]
    kind: Shown[str]
    ask: Shown[Json]
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
    request_key: Shown[str | None]
    idempotency_key: Shown[str]
    params: Shown[Json]
    cancel_requested_at: Shown[datetime | None]
    claims: Annotated[Json, redaction.claims]
    attempts: Annotated[list[Attempt], redaction.rows(Attempt)]
    waits: Annotated[list[Wait], redaction.rows(Wait)]
    checkpoint: Shown[Json]
    step_count: Shown[int]
    steps: Annotated[list[Step], redaction.rows(Step)]
    spends: Annotated[list[Spent], redaction.rows(Spent)]
    spec: Shown[Json]


class LogLine(TypedDict):
    """A line that a run logged or printed."""

    attempt: Shown[int]
    seq: Shown[int]
    at: Shown[datetime]
    level: Shown[str]
    source: Shown[str]
    text: Annotated[str, redaction.text]


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
    name: Shown[str]
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
    error: Annotated[str | None, redaction.not_loaded]
    seen_at: Shown[datetime]


class Change(TypedDict):
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


class Bulk(TypedDict):
    """What a bulk change has done; `next` continues it."""

    dry_run: Shown[bool]
    canary: Shown[int | None]
    runs: Annotated[list[BulkRow], redaction.rows(BulkRow)]
    next: Shown[str | None]


def columns_of(kind: type) -> tuple[str, ...]:
    """The columns of a row, in their order."""
    return tuple(kind.__annotations__)


@dataclass(frozen=True, slots=True)
class Page:
    """What narrows a list, and which page of it; newest rows first, starting below the row `after`.

    `state` is one state, or several separated by commas.

    Raises:
        UsageError: the limit is out of range.
        NotFound: `after` is not a valid id.
    """

    definition: str | None = None
    state: str | None = None
    since: datetime | None = None
    limit: int | None = None
    after: str | None = None
    query: Query | None = None
    """Of runs and orgs: what to search for."""
    broken: bool = False
    """Of orgs: only broken ones."""

    def __post_init__(self) -> None:
        if self.limit is not None and not 1 <= self.limit <= MAX_LIMIT:
            raise UsageError(
                f"limit {self.limit} is not between 1 and {MAX_LIMIT}", fix="use `after` for the next page"
            )
        if self.after is not None:
            object.__setattr__(self, "after", checked_id(self.after))

    @property
    def states(self) -> tuple[str, ...]:
        """The states, or none for those that the list shows by default."""
        return () if self.state is None else tuple(part.strip() for part in self.state.split(","))


def checked_id(text: str) -> str:
    """The id in canonical form; raises NotFound if it is not a UUID."""
    try:
        return str(UUID(text))
    except ValueError:
        raise NotFound(f"{text!r} is not a valid id", fix="`-o id` prints the ids of a list") from None


@dataclass(frozen=True, slots=True, eq=False)
class Listing(Generic[R]):
    """A list: its rows, how they can be narrowed, and who may see them."""

    name: str
    row: type[R]
    about: str
    """What the verb `list` says in its help."""
    table: tuple[str, ...]
    """The columns that the command line prints for people."""
    filters: tuple[str, ...] = ("org", "since")
    states: tuple[str, ...] = ()
    admin_only: bool = False
    """Whether operators need the role admin in the API."""
    few_per_org: bool = False
    """Whether one org's list has no default limit."""
    not_in_api: tuple[str, ...] = ()
    """Filters that only the command line has."""
    note: str = ""
    """What the reference adds to the parameters."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of the API, in the order of the reference."""
        paged = ("limit", "after") if self.name != "handlers" else ()
        return (*(name for name in self.filters if name not in self.not_in_api), *paged)

    def limit_of(self, org: OrgScope, page: Page) -> int:
        """How many rows a full page has."""
        return page.limit or (MAX_LIMIT if self.few_per_org and org is not ALL_ORGS else DEFAULT_LIMIT)


ORGS = Listing(
    "orgs",
    Org,
    "List orgs, newest first.",
    ("code", "name", "issuer", "state", "max_concurrent_runs", "weight", "tags", "timezone", "created_at"),
    filters=("org", "state", "since", "q", "broken"),
    states=get_args(OrgState),
)
DEFINITIONS = Listing(
    "definitions",
    Definition,
    "List definitions, newest first; closed ones only with --state closed.",
    ("org", "name", "handler", "schedule", "timezone", "state", "next_scheduled_for", "revision"),
    filters=("org", "definition", "state", "since"),
    states=("active", "paused", "disabled", "closed"),
)
TEMPLATES = Listing(
    "templates",
    Template,
    "List templates, newest first, with how many orgs the last change has reached.",
    ("name", "orgs", "handler", "schedule", "state", "revision", "reached"),
    filters=("state", "since"),
    states=("open", "closed"),
    few_per_org=True,
    note="an org sees the templates of its definitions",
)
RUNS = Listing(
    "runs",
    Run,
    "List runs, newest first.",
    ("state", "org", "definition", "scheduled_for", "took", "why", "id"),
    filters=("org", "definition", "state", "since", "q", "pool"),
    states=("waiting", "running", "succeeded", "failed", "cancelled", "refused", "skipped"),
)
SKIPS = Listing(
    "skips",
    Skip,
    "List skips, newest first; a row is a range of consecutive scheduled times, both ends included.",
    ("org", "definition", "revision", "skipped_from", "skipped_until", "count", "reason"),
    filters=("org", "definition", "since"),
)
HANDLERS = Listing(
    "handlers",
    Handler,
    "List handlers by name, those that do not load with their error.",
    ("name", "distribution", "version", "isolation", "scopes", "error"),
    filters=("org",),
    note="an org sees the handlers of its definitions",
)
CREDENTIALS = Listing(
    "credentials",
    CredentialRow,
    "List credentials, newest first, without any secret; `uses` counts token requests.",
    (
        *("org", "generation", "client_id", "kind", "state", "created_at", "created_by"),
        *("last_used_at", "uses", "last_error"),
    ),
    filters=("org", "state", "since"),
    states=("pending", "active", "retired"),
    admin_only=True,
    few_per_org=True,
    not_in_api=("since",),
)
SECRETS = Listing(
    "secrets",
    SecretRow,
    "List secrets of orgs, newest first, without their values.",
    ("org", "name", "generation", "created_at", "created_by", "rotated_at", "rotated_by"),
    filters=("org", "since"),
    admin_only=True,
    few_per_org=True,
)
AUDIT = Listing(
    "audit",
    Change,
    "List changes, newest first.",
    ("at", "actor", "action", "org", "subject", "detail"),
    admin_only=True,
)
BACKFILLS = Listing(
    "backfills",
    Backfill,
    "List backfills, newest first, with how many of their scheduled times have run.",
    ("id", "org", "definition", "range_from", "range_until", "state", "ended", "made", "instants"),
    filters=("org", "definition"),
)
CALENDARS = Listing(
    "calendars",
    Calendar,
    "List calendars, newest first.",
    ("name", "days", "first_date", "last_date", "updated_at", "updated_by"),
    filters=("since",),
)
# The lists of the API.
LISTS: tuple[Listing[Any], ...] = (
    *(ORGS, DEFINITIONS, TEMPLATES, RUNS, SKIPS, HANDLERS, CREDENTIALS, AUDIT),
)
