"""The API's endpoints, declared once: for the router, the checks of queries and bodies, and OpenAPI.

The schema of a parameter or a body member is what requests are checked against, and what
the document says. Lists declare theirs in `store.lists`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker.diagnosis.matters import Overview
from worker.features.console.callers import Role
from worker.model.definitions.definition import EDITABLE
from worker.model.runs.preview import NextTime
from worker.model.runs.run import MAX_AHEAD
from worker.model.runs.waits import MAX_WAITS
from worker.store.lists import LISTS, MAX_LIMIT, Listing
from worker.store.lists.costs import PARTS, ModelCost
from worker.store.lists.read import DefinitionState
from worker.store.lists.rows import (
    AttemptRow,
    Backfill,
    Bulk,
    CredentialRow,
    DefinitionDetail,
    Explanation,
    LogRow,
    OrgDetail,
    PlannedBackfill,
    PlannedStepRow,
    RolloutDetail,
    RolloutRow,
    Run,
    RunDetail,
    WaitRow,
)
from worker.store.lists.usage import BYS, BudgetLevel, Raise, Usage

BASE = "/api/v1"
# Every operation may answer these; 404 for what does not exist, or belongs to another org.
ALWAYS = (400, 401, 403, 404, 429, 503)
MAX_TEXT = 500

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter of a query or header, or a member of a body."""

    name: str
    schema: Schema
    about: str
    required: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """One operation: `answer` is the class of the row that it returns, or a schema."""

    operation: str
    method: str
    path: str
    about: str
    answer: Any = None
    status: int = 200
    is_list: bool = False
    query: tuple[Field, ...] = ()
    headers: tuple[Field, ...] = ()
    body: tuple[Field, ...] | None = None
    errors: tuple[int, ...] = ()
    role: Role = "viewer"
    # Whether the role `starter` may call it too; it may call nothing else.
    for_starters: bool = False
    media: str = "application/json"
    # Headers of the answer.
    returns: Mapping[str, str] = field(default_factory=dict)

    @property
    def path_names(self) -> tuple[str, ...]:
        """The names of the parts of its path that a request chooses."""
        return tuple(part[1:-1] for part in self.path.replace(":", "/").split("/") if part.startswith("{"))

    @property
    def statuses(self) -> Sequence[int]:
        """The statuses of its errors."""
        with_body = (409, 413, 422) if self.body is not None else ()
        return sorted({*ALWAYS, *self.errors, *with_body})


def _text(most: int = MAX_TEXT) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": most}


def _number(most: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most}


BOOLEAN: Schema = {"type": "boolean"}
STRING: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}
LIMIT = _number(MAX_LIMIT)
TIME: Schema = {"type": "string", "maxLength": 64}
# Never shown, not even in an error: `body_of` has a check of its own for it.
SECRET: Schema = {"type": "string", "minLength": 1, "maxLength": 16_384, "writeOnly": True}
REASON = Field("reason", _text(), "Why; it is kept in the audit.")
REPLAYED = "Idempotency-Replayed"
_ETAG = {"ETag": "What `If-Match` of a change takes."}
_NEW_RUN: Mapping[str, Any] = {"status": 201, "returns": {"Location": "The new run."}}

# How each filter of a list is written in a query.
FILTERS: Mapping[str, tuple[Schema, str]] = {
    "org": (STRING, "An org's code."),
    "definition": (STRING, "A definition's name."),
    "since": (TIME, "The earliest time: `2027-01-01T08:00:00Z`, `2027-01-01`, or `2h` (ago)."),
    "limit": (LIMIT, "Rows of a page, 50 by default."),
    "after": (STRING, "The id of the last row of the page before."),
    "q": ({"type": "string", "maxLength": MAX_TEXT}, "A search, as `runs list -q` takes it."),
    "pool": (STRING, "A pool; only the newest runs are searched, as with `q`."),
    "broken": ({"enum": ["true", "false"]}, "Only broken orgs."),
    "late": ({"enum": ["true", "false"]}, "Only orgs with a definition that is not done by its deadline."),
}

RUN_PATH = "/runs/{run}"
ORG_PATH = "/orgs/{org}"
DEFINITION_PATH = "/definitions/{org}/{name}"


def parameters_of(listing: Listing[Any]) -> tuple[str, ...]:
    """The parameters of a list; each may be narrowed to one org."""
    return tuple(dict.fromkeys(("org", *listing.parameters)))


def list_endpoint(listing: Listing[Any]) -> Endpoint:
    """The endpoint of a list."""
    query = []
    for name in parameters_of(listing):
        if name == "state":
            schema = STRING
            about = f"One state, or several with commas: {', '.join(listing.states)}."
        else:
            schema, about = FILTERS[name]
        query.append(Field(name, schema, about))
    return Endpoint(
        f"list_{listing.name}",
        "GET",
        f"/{listing.name}",
        listing.about,
        listing.row,
        is_list=True,
        query=tuple(query),
        role="admin" if listing.admin_only else "viewer",
        errors=(304,),
        returns={"Link": 'The next page, with `rel="next"`, if this one is full.'},
    )


def _get(operation: str, path: str, about: str, answer: Any, *query: Field, **more: Any) -> Endpoint:
    return Endpoint(operation, "GET", path, about, answer, query=query, **more)


def _change(
    operation: str, call: str, about: str, answer: Any, *body: Field, role: Role = "operator", **more: Any
) -> Endpoint:
    """An endpoint that changes something; `call` is its method and path."""
    method, path = call.split()
    return Endpoint(operation, method, path, about, answer, body=body, role=role, **more)


OVERVIEW = _get(
    "show_overview",
    "/status",
    "What needs attention over all orgs, most harmful first, as `status -o json` prints it. Only operators.",
    Overview,
)
RUN = _get(
    "show_run",
    RUN_PATH,
    "One run with its attempts, steps and claims; for operators also its spec.",
    RunDetail,
    for_starters=True,
)
WHY = _get(
    "explain_run",
    f"{RUN_PATH}/why",
    "Why a run has its state: the cause, whose it is, since when, how later runs ended, the next step, and a "
    "text for the customer.",
    Explanation,
)
ATTEMPTS = _get("list_attempts", f"{RUN_PATH}/attempts", "The attempts of a run.", AttemptRow, is_list=True)
LOGS = _get(
    "list_logs",
    f"{RUN_PATH}/logs",
    "Log lines of a run, oldest first.",
    LogRow,
    Field("limit", LIMIT, f"Lines of a page, {MAX_LIMIT} by default."),
    Field("after", STRING, "`attempt.seq` of the last line of the page before."),
    Field("newest", {"enum": ["true", "false"]}, "The newest lines, instead of a page."),
    is_list=True,
)
EVENTS = _get(
    "watch_run",
    f"{RUN_PATH}/events",
    "Server-sent events of a run: `state` (the run, as lists show it), `progress`, `log` (a line). The "
    "stream ends with the last state of the run; 204 if there is nothing after `Last-Event-ID`.",
    None,
    Field("after", STRING, "Lines after this `attempt.seq`; all of them by default."),
    headers=(Field("Last-Event-ID", STRING, "Resume after this event."),),
    errors=(204,),
    media="text/event-stream",
    for_starters=True,
)
CANCEL = _change(
    "cancel_run",
    f"POST {RUN_PATH}/cancel",
    "Cancel a run; a running one stops after its grace period.",
    Run,
    REASON,
)
RETRY = _change(
    "retry_run",
    f"POST {RUN_PATH}/retry",
    "Make a new run of an ended one.",
    Run,
    Field("from_checkpoint", BOOLEAN, "Start from the checkpoint and the steps of the old run."),
    Field("again", BOOLEAN, "Also if it was retried already."),
    Field(
        "only_children",
        BOOLEAN,
        "Start those runs again that it has started and that did not succeed: an unfinished run waits for "
        "them in their places, one that has ended is retried from its checkpoint.",
    ),
    REASON,
    **_NEW_RUN,
)
ANSWER = _change(
    "answer_run",
    f"POST {RUN_PATH}/answers/{{name}}",
    "Answer what a run waits for, so that it goes on. 400 if the answer is not one of its options; 409 if it "
    "was answered already, its deadline has passed, the run waits for something else, or it has ended.",
    WaitRow,
    Field("data", {}, "The answer: any JSON, at most 64 KiB.", required=True),
    Field("occurrence", _number(MAX_WAITS), "Which wait of that name in the run, 1 by default."),
)
_MANY = (
    Field("q", _text(), "A search.", required=True),
    Field("dry_run", BOOLEAN, "Change nothing, only say which."),
    Field("canary", LIMIT, "Stop after this number; `next` continues."),
    REASON,
    Field("after", _text(), "`next` of the call before."),
)
RETRY_MANY = _change(
    "retry_runs",
    "POST /runs:retry",
    f"Retry the runs that match and were not retried yet, oldest end first, at most {MAX_LIMIT}: failed ones "
    "unless the search names other states.",
    Bulk,
    *_MANY,
)
CANCEL_MANY = _change(
    "cancel_runs",
    "POST /runs:cancel",
    f"Cancel the unfinished runs that match, oldest first, at most {MAX_LIMIT}.",
    Bulk,
    *_MANY,
)
ORG = _get("show_org", ORG_PATH, "One org with its credentials, never a secret.", OrgDetail)
_NOTE = Field("note", _text(), "Why; it is shown with the org.")
PAUSE_ORG = _change(
    "pause_org",
    f"POST {ORG_PATH}/pause",
    "Pause an org: no runs fire or start; running ones continue. Only operators.",
    OrgDetail,
    _NOTE,
)
RESUME_ORG = _change(
    "resume_org",
    f"POST {ORG_PATH}/resume",
    "Resume a paused or suspended org from now on; the times meanwhile are not replayed. Only operators.",
    OrgDetail,
    _NOTE,
)
BUDGETS = _get(
    "list_budgets",
    "/budgets/{org}",
    "The budgets of an org now: limits with raises, what is used and left. Only operators.",
    BudgetLevel,
    is_list=True,
)
RAISE = _change(
    "raise_budget",
    "POST /budgets/{org}/raise",
    "Raise an org's budgets of a meter; runs that wait for them go on. Only operators.",
    Raise,
    Field("meter", _text(200), "The meter, such as `llm_tokens`.", required=True),
    Field(
        "by",
        {"type": ["integer", "string"]},
        "What to add to the limit of each period; of money a text such as `5 USD`.",
        required=True,
    ),
    Field("per", {"enum": ["day", "month", "run"]}, "The budgets to raise; `day` by default."),
    Field("until", TIME, "When the raise ends; by default with the period."),
    REASON,
)
USAGE = _get(
    "list_usage",
    "/usage",
    "What orgs spent, a row for each org and meter; a page has `limit` orgs.",
    Usage,
    Field("org", STRING, "An org's code."),
    Field("by", {"enum": list(BYS)}, "Also a row for each definition or UTC day."),
    Field("since", TIME, "The first UTC day, 29 days ago by default."),
    Field("until", TIME, "The last UTC day, today by default."),
    Field("limit", LIMIT, "Orgs of a page, 50 by default."),
    Field("after", STRING, "The last org of the page before."),
    is_list=True,
    errors=(304,),
)
COSTS = _get(
    "list_costs",
    "/costs",
    "What models cost, a row for each org and each of the parts; money in nano-units of the currency. For "
    "operators, and with `[web] org_usage` also for an org's own token.",
    ModelCost,
    Field("org", STRING, "An org's code."),
    Field("by", STRING, f"Some of `{','.join(PARTS)}`, `org` by default: a row for each."),
    Field("since", TIME, "The first UTC day, 29 days ago by default."),
    Field("until", TIME, "The last UTC day, today by default."),
    Field("limit", LIMIT, "Orgs of a page, 50 by default."),
    Field("after", STRING, "The last org of the page before."),
    is_list=True,
    errors=(304,),
)
ADD_CREDENTIAL = _change(
    "add_credential",
    "POST /credentials/{org}",
    "Add a generation of an org's credentials, which is tried first; the secret is sealed and never shown. "
    "Give `client_secret` or `reference`. 409 for a secret in a process without the key ring. Only admins.",
    CredentialRow,
    Field("client_id", _text(), "The client id at the issuer.", required=True),
    Field("client_secret", SECRET, "The secret, or a private key in PEM."),
    Field("reference", _text(), "Instead of a secret: `file:NAME`, a file in `secrets_dir`."),
    Field("kind", {"enum": ["client_secret", "private_key"]}, "What it is; `client_secret` by default."),
    status=201,
    role="admin",
)
RETIRE_CREDENTIAL = _change(
    "retire_credential",
    "POST /credentials/{org}/{generation}/retire",
    "Retire a generation: it gets no more tokens, and workers drop cached ones within 2 s. Only admins.",
    CredentialRow,
    role="admin",
)
DEFINITION = _get(
    "show_definition",
    DEFINITION_PATH,
    "One definition; for operators with its whole spec.",
    DefinitionDetail,
    errors=(304,),
    returns=_ETAG,
)
NEXT = _get(
    "preview_definition",
    f"{DEFINITION_PATH}/next",
    "The next scheduled times of a definition, as `definitions next` prints them.",
    NextTime,
    Field("from", TIME, "From this time on; by default from those that are due."),
    Field("count", LIMIT, "How many, 10 by default."),
    is_list=True,
)
EDIT = _change(
    "edit_definition",
    f"PATCH {DEFINITION_PATH}",
    "Change keys of a definition, as in a file for `apply`; null restores the default. Only operators.",
    DefinitionDetail,
    *(Field(key, {}, f"The key `{key}` of a definition.") for key in EDITABLE),
    REASON,
    headers=(Field("If-Match", STRING, "An ETag: 412 if the definition was edited since."),),
    errors=(412,),
    returns=_ETAG,
)
RUN_NOW = _change(
    "run_definition",
    f"POST {DEFINITION_PATH}/run",
    "Run a definition now.",
    Run,
    Field("params", OBJECT, "Params of this run, laid over the definition's."),
    Field(
        "not_before",
        TIME,
        f"The earliest start, at most {MAX_AHEAD.days} days ahead: `2027-01-01T08:00:00Z`.",
    ),
    REASON,
    headers=(Field("Idempotency-Key", STRING, "Requests with one key make one run."),),
    for_starters=True,
    status=201,
    returns={
        "Location": "The run.",
        REPLAYED: "Only if a run of this key was there: `same-params`, or `other-params` if it has others.",
    },
)
PAUSE = _change(
    "pause_definition",
    f"POST {DEFINITION_PATH}/pause",
    "Pause a definition: it is not due until it is resumed; a running run continues.",
    DefinitionDetail,
    Field("note", _text(), "Why; it is shown with the definition."),
)
RESUME = _change(
    "resume_definition",
    f"POST {DEFINITION_PATH}/resume",
    "Resume a paused definition from now on; the times meanwhile are not replayed.",
    DefinitionDetail,
)
BACKFILL = _change(
    "backfill_definition",
    f"POST {DEFINITION_PATH}/backfill",
    "Run every scheduled time of a past range again; with `dry_run` only say which. Only operators.",
    {"anyOf": [Backfill, PlannedBackfill]},
    Field("from", TIME, "The first time: `2027-01-01T08:00:00Z`, or `2d` (ago).", required=True),
    Field("until", TIME, "The end of the range, itself excluded; not in the future.", required=True),
    Field("limit", LIMIT, "The number of its runs that can be unfinished at once, 1 by default."),
    Field("dry_run", BOOLEAN, "Change nothing."),
    REASON,
)

ROLLOUT_PATH = "/rollouts/{rollout}"
ROLLOUT_LIST = _get("list_rollouts", "/rollouts", "All rollouts. Only operators.", RolloutRow, is_list=True)
ROLLOUT = _get(
    "show_rollout",
    ROLLOUT_PATH,
    "One rollout with the numbers of both sides, its curves and the orgs that moved. Only operators.",
    RolloutDetail,
)
ROLLOUT_PLAN = _get(
    "plan_rollout",
    f"{ROLLOUT_PATH}/plan",
    "The orgs, runs and days that each step needs at today's volume. Only operators.",
    PlannedStepRow,
    is_list=True,
)
ADVANCE_ROLLOUT = _change(
    "advance_rollout",
    f"POST {ROLLOUT_PATH}/advance",
    "Begin the first or the next step; 409 unless the step before is ready. Only operators.",
    RolloutDetail,
    Field("anyway", BOOLEAN, "Also if the step has not shown yet what it must."),
    REASON,
)


def _rollout_move(verb: str, about: str) -> Endpoint:
    reason = Field("reason", _text(), "Why; it is kept in the audit.", required=True)
    call = f"POST {ROLLOUT_PATH}/{verb}"
    return _change(f"{verb}_rollout", call, f"{about} Only operators.", RolloutDetail, reason)


# By the verb of the operation.
ROLLOUT_MOVES: Mapping[str, Endpoint] = {
    "halt": _rollout_move("halt", "Give new runs of all orgs the old version; running ones go on."),
    "resume": _rollout_move("resume", "Begin the step of a halted rollout again."),
    "finish": _rollout_move("finish", "End a rollout: new runs of all its orgs take the new version."),
    "undo": _rollout_move("undo", "End a rollout: new runs of all orgs take the old version."),
}

STATE_PATH = f"{DEFINITION_PATH}/state"
STATE = _get(
    "show_state",
    STATE_PATH,
    "What a definition remembers between its runs; `data` is empty if it has no state.",
    DefinitionState,
    errors=(304,),
)
SET_STATE = _change(
    "set_state",
    f"PUT {STATE_PATH}",
    "Replace the state of a definition; 409 while a run of it is running. Only operators.",
    DefinitionState,
    Field("data", OBJECT, "The new state, at most 64 KiB.", required=True),
)
CLEAR_STATE = _change(
    "clear_state",
    f"DELETE {STATE_PATH}",
    "Clear the state of a definition; 409 while a run of it is running. Only operators.",
    DefinitionState,
)

DOCUMENT = _get("openapi", "/openapi.json", "This document.", OBJECT, errors=(304,))

LIST_ENDPOINTS: Mapping[Endpoint, Listing[Any]] = {list_endpoint(listing): listing for listing in LISTS}
ENDPOINTS: tuple[Endpoint, ...] = (
    *LIST_ENDPOINTS,
    *(OVERVIEW, USAGE, COSTS, BUDGETS, RAISE),
    *(ORG, PAUSE_ORG, RESUME_ORG, ADD_CREDENTIAL, RETIRE_CREDENTIAL),
    *(RUN, WHY, ATTEMPTS, LOGS, EVENTS, CANCEL, RETRY, ANSWER, CANCEL_MANY, RETRY_MANY),
    *(DEFINITION, NEXT, EDIT, RUN_NOW, PAUSE, RESUME, BACKFILL),
    *(STATE, SET_STATE, CLEAR_STATE),
    *(ROLLOUT_LIST, ROLLOUT, ROLLOUT_PLAN, ADVANCE_ROLLOUT, *ROLLOUT_MOVES.values()),
    DOCUMENT,
)
