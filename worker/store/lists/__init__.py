"""What can be listed, declared once for command line, JSON API, console and reference.

A `Listing` declares how the rows of `rows` can be narrowed, and who may see them. `read` and `runs`
have the SQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, get_args
from uuid import UUID

from worker.errors import NotFound, UsageError
from worker.ids import ALL_ORGS, OrgScope
from worker.model.orgs import OrgState
from worker.store.lists.rows import (
    Backfill,
    Calendar,
    ChangeRow,
    CredentialRow,
    DefinitionRow,
    Handler,
    LimitRow,
    ModelBatch,
    OrgRow,
    RolloutRow,
    Run,
    SecretRow,
    Skip,
    Template,
)

if TYPE_CHECKING:
    from worker.model.search import Query

R = TypeVar("R")
DEFAULT_LIMIT = 50
MAX_LIMIT = 1000


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
    late: bool = False
    """Of orgs: only those with a definition that is not done by its deadline."""

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


FIRST_PAGE = Page()


class FoundRows(NamedTuple, Generic[R]):
    """The rows of a page, and the id to continue after; None if there are no more."""

    rows: list[R]
    next: str | None


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


# What an open definition may be besides its state.
TROUBLES = ("broken", "overdue", "late", "delayed")
ORGS = Listing(
    "orgs",
    OrgRow,
    "List orgs, newest first.",
    ("code", "name", "issuer", "state", "max_concurrent_runs", "weight", "tags", "timezone", "created_at"),
    filters=("org", "state", "since", "q", "broken", "late"),
    states=get_args(OrgState),
)
DEFINITIONS = Listing(
    "definitions",
    DefinitionRow,
    "List definitions, newest first; closed ones only with --state closed.",
    ("org", "name", "handler", "schedule", "timezone", "state", "next_scheduled_for", "revision"),
    filters=("org", "definition", "state", "since"),
    states=("active", "paused", "disabled", "closed", *TROUBLES),
)
TEMPLATES = Listing(
    "templates",
    Template,
    "List templates, newest first, with how many orgs have their definition.",
    ("name", "orgs", "handler", "schedule", "state", "revision", "reaches"),
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
    ("name", "source", "pool", "distribution", "version", "isolation", "scopes", "egress", "error"),
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
    ("org", "name", "origin", "header", "generation", "created_at", "created_by", "rotated_at", "rotated_by"),
    filters=("org", "since"),
    admin_only=True,
    few_per_org=True,
)
AUDIT = Listing(
    "audit",
    ChangeRow,
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
LIMITS = Listing(
    "limits",
    LimitRow,
    "List limits of calls to other services, newest first.",
    ("origin", "per", "rate", "burst", "concurrent", "max_wait", "updated_at", "updated_by"),
    filters=("since",),
)
BATCHES = Listing(
    "batches",
    ModelBatch,
    "List batches of model requests, newest first; `late` counts results that were paid for nothing.",
    ("api", "model", "pool", "state", "requests", "late", "created_at", "sent_at", "ended_at", "error"),
    filters=("since",),
)
ROLLOUTS = Listing(
    "rollouts",
    RolloutRow,
    "List rollouts, newest first.",
    ("name", "definitions", "from_handler", "to_handler", "state", "step", "steps", "ready", "updated_at"),
    filters=("since",),
)
# The lists of the API.
LISTS: tuple[Listing[Any], ...] = (
    *(ORGS, DEFINITIONS, TEMPLATES, RUNS, SKIPS, HANDLERS, CREDENTIALS, AUDIT),
)
