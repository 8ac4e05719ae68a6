"""Callers: who calls, what they may do, and the database in their role."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from sqlalchemy import Connection
from starlette.requests import Request

from worker.errors import AccessDenied, Conflict, NotFound
from worker.ids import ALL_ORGS, OrgId, OrgScope, RunId, given_id
from worker.model.search import KEYS, KEYS_OF_ORGS, Query
from worker.operations import answers, approvals, budgets, bulk, credentials, definitions, orgs, plans, runs
from worker.operations import backfill as backfills
from worker.operations.changes import ROLLOUT_MOVES
from worker.store import edit_runs, roles
from worker.store.database import Database
from worker.store.edit_runs import Cancellable, Retryable
from worker.store.lists import MAX_LIMIT, checked_id
from worker.store.lists.rows import (
    Bulk,
    BulkRow,
    CredentialRow,
    DefinitionDetail,
    PlannedBackfill,
    RolloutDetail,
    Run,
)
from worker.store.redaction import Row, redacted

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# Opens the key ring; None in a process that has none.
OpenRing = Callable[[], "KeyRing | None"]
EditDefinition = Callable[..., DefinitionDetail]
# Runs that one step of a bulk change takes, and the runs that each change is for.
STEP = 20
_FILTERS: Mapping[str, type[Cancellable | Retryable]] = {"retry": Retryable, "cancel": Cancellable}
T = TypeVar("T")
P = ParamSpec("P")

# `member` and `manager` are roles of people in their own org, `starter` is that of a product's backend.
Role = Literal["starter", "viewer", "operator", "admin", "member", "manager"]
RANK: Mapping[Role, int] = {"starter": -1, "member": 0, "manager": 0, "viewer": 0, "operator": 1, "admin": 2}
Kind = Literal["operator", "org", "person", "link"]

# What can be changed through the web side; `pause` includes to resume. Those not in BY_ORGS are for operators
# only, and `[web.portal] may` says which of BY_ORGS a manager may do.
Action = Literal[
    "run",
    "retry",
    "cancel",
    "pause",
    "answer",
    "edit",
    "backfill",
    "pause_org",
    "budget",
    "credentials",
    "state",
    "approve",
    "rollout",
]
BY_ADMINS: frozenset[Action] = frozenset({"credentials", "approve"})
BY_ORGS: frozenset[Action] = frozenset({"run", "retry", "cancel", "pause", "answer"})


# Changes that an MCP client may plan, by the operation of the API.
PLANNED: Mapping[str, Action] = {change: each.action for change, each in plans.PLANNABLE.items()}


def no_ring() -> None:
    """The key ring of a process that has none."""


def _role_for(action: Action) -> Role:
    """The least role of an operator that may do this."""
    return "admin" if action in BY_ADMINS else "operator"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: an operator, a person, or an org with its own token; `org` is all that it sees, or None."""

    name: str
    role: Role
    org: str | None = None
    org_id: OrgId | None = None
    until: datetime | None = None
    kind: Kind = "operator"
    # From the token of an org or a person, so that each later request of its session is checked again.
    issuer: str = ""
    client_id: str = ""
    has_org_scope: bool = False
    # A person's `sub`, and the org of the token, which an operator's `org` does not say.
    subject: str = ""
    home: str = ""
    # A hash of what a session rests on; the session ends when that is gone.
    basis: str = field(default="", repr=False)
    # It came with the token of an MCP client: it reads and plans, and a person confirms.
    is_client: bool = False
    # What a manager may do.
    portal: frozenset[str] = frozenset()

    @property
    def actor(self) -> str:
        """The name in audit rows and as the origin of runs."""
        if self.kind == "person":
            return f"person:{self.subject}@{self.home}"
        if self.org is not None:
            return f"org:{self.org}"
        return f"{'starter' if self.role == 'starter' else 'operator'}:{self.name}"

    @property
    def key(self) -> str:
        """What calls and sessions are counted by: an operator, or one client of an org."""
        return f"{self.actor} {self.client_id}"

    @property
    def search_keys(self) -> Mapping[str, str]:
        """The keys of its searches."""
        return KEYS if self.org is None else KEYS_OF_ORGS

    def require(self, role: Role) -> None:
        """Raise AccessDenied unless the caller has at least this role."""
        if RANK[self.role] < RANK[role]:
            raise AccessDenied(
                f"this needs the role {role}; {self.actor} has {self.role}",
                fix="use another token, or grant the role: [[web.operators]] or web.org_role in worker.toml",
            )

    def may(self, action: Action) -> bool:
        """Whether the caller may change this, of an org that it sees."""
        if self.org is not None and action not in BY_ORGS:
            return False
        if self.role == "manager":
            return action in self.portal
        if self.role == "starter":
            return action == "run"
        return RANK[self.role] >= RANK[_role_for(action)]

    def require_may(self, action: Action) -> None:
        """Raise AccessDenied unless the caller may change this, of an org that it sees."""
        if self.may(action):
            return
        if self.kind == "person" and self.org is not None:
            raise AccessDenied(
                f"your role in {self.org} is {self.role}, which may not do this ({action})",
                fix="ask the people who run this service",
            )
        self.require(_role_for(action))
        raise AccessDenied(
            f"only an operator may do this, not {self.actor}", fix="ask the operator of this worker"
        )

    def require_may_plan(self, change: str) -> None:
        """Raise AccessDenied unless the caller may plan this change, for the operator to confirm."""
        self.require_may(PLANNED[change])
        if not self.is_client:
            raise AccessDenied(
                f"only an MCP client plans changes, and {self.actor} did not send the token of one",
                fix="give the client the token of `operators mcp-token NAME`, which makes no change itself",
            )

    def scope(self, org: str | None = None) -> OrgScope:
        """Whose rows to read: the caller's own, or for operators those of `org` or of all orgs.

        Raises:
            NotFound: it is another org, which does not exist for this caller.
        """
        if self.org is None:
            return ALL_ORGS if org is None else org
        if org in (None, self.org):
            return self.org
        raise NotFound(f"there is no org {org}", fix=f"leave org out, or ask for your own: {self.org}")

    def sees(self, kind: type, row: Row) -> Row:
        """A row as this caller sees it; `kind` is the class that declares its columns."""
        return row if self.org is None else redacted(kind, row, self.org)

    def reader_of(self, org: str, org_id: OrgId | None = None) -> Caller:
        """Who reads a run of this org: the caller, or in place of a starter the org, which sees less."""
        return replace(self, org=org, org_id=org_id) if self.role == "starter" else self


def check_started(connection: Connection, caller: Caller, run_id: str) -> None:
    """Check that a starter itself has started this run; others may read what they see.

    Raises:
        NotFound: it has not, or it gave a short id, for which other runs would be compared.
    """
    if caller.role != "starter":
        return
    given = given_id(run_id)
    is_whole = given is not None and given.is_whole
    row = edit_runs.find(connection, ALL_ORGS, RunId(checked_id(run_id))) if is_whole else None
    if row is None or row["created_by"] != caller.actor:
        raise NotFound(
            f"{caller.actor} has started no run {run_id:.80}", fix="give the whole id that the start returned"
        )


def caller_of(request: Request) -> Caller:
    """The caller that AuthMiddleware found."""
    caller: Caller = request.scope["caller"]
    return caller


@dataclass(frozen=True, slots=True)
class Many:
    """A bulk change: of which runs, and how many in this call; `after` is the `next` of the call before.

    With `canary` it stops after that number. `dry_run` only says which runs it would change.
    """

    query: Query
    canary: int | None = None
    reason: str | None = None
    limit: int = MAX_LIMIT
    after: str | None = None
    dry_run: bool = False


def _check_of(caller: Caller, action: Action, org: str) -> None:
    # First: for an org, what belongs to another org does not exist.
    caller.scope(org)
    caller.require_may(action)


def _of_run(action: Action, operation: Callable[..., T]) -> Callable[..., Awaitable[T]]:
    """A change of a run, which an org finds only among its own; it takes what the operation does."""

    async def change(database: CallerDatabase, caller: Caller, run: str, *args: Any, **what: Any) -> T:
        return await database.change(caller, action, operation, run, *args, org=caller.org, **what)

    return change


def _of_org(action: Action, operation: Callable[..., T]) -> Callable[..., Awaitable[T]]:
    """A change of what belongs to an org; it takes what the operation does."""

    async def change(database: CallerDatabase, caller: Caller, org: str, *args: Any, **what: Any) -> T:
        return await database.change_of(caller, action, operation, org, *args, **what)

    return change


class CallerDatabase:
    """The database in the role of a caller; the web side has no other access to it.

    On PostgreSQL the server then limits an org to its own rows and hides secrets from
    operators. SQLite has no roles: there each store function is given the org. `edit` is
    `edit_definition` with what the settings allow, `open_ring` opens the key ring that seals new
    secrets, if this process may have one, and `secrets_dir` is the folder that holds secrets in files.

    Each change takes what its operation does, and raises as it, AccessDenied if the caller may not do it, and
    NotFound for what belongs to another org. A `reason` is kept in the audit row.
    """

    def __init__(
        self,
        database: Database,
        *,
        edit: EditDefinition = definitions.edit_definition,
        open_ring: OpenRing = no_ring,
        secrets_dir: Path | None = None,
    ) -> None:
        self._database = database
        self._edit = edit
        self._open_ring = open_ring
        self._secrets_dir = secrets_dir

    async def read(self, caller: Caller, work: Callable[[Connection], T]) -> T:
        """Run `work` in a database thread, in autocommit mode so that SQLite's writers do not wait."""
        return await self._as(caller).call_autocommit(work)

    async def watch(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Read rows of several orgs for event streams; each stream was admitted in its caller's own role."""
        return await self._database.acting(roles.ALL_ORGS).call_autocommit(work, *args, **kwargs)

    cancel = _of_run("cancel", runs.cancel)
    retry = _of_run("retry", runs.retry)
    answer = _of_run("answer", answers.answer)
    pause = _of_org("pause", definitions.pause_definition)
    resume = _of_org("pause", definitions.resume_definition)
    pause_org = _of_org("pause_org", partial(orgs.set_org_state, state="paused"))
    resume_org = _of_org("pause_org", partial(orgs.set_org_state, state="active"))
    retire_credential = _of_org("credentials", credentials.retire_credential)
    raise_budget = _of_org("budget", budgets.raise_budget)
    set_state = _of_org("state", definitions.set_state)
    clear_state = _of_org("state", definitions.clear_state)
    backfill = _of_org("backfill", backfills.backfill)

    async def start(self, caller: Caller, org: str, name: str, **what: Any) -> runs.Started:
        """Start a run of a definition."""
        what |= {"by_org": caller.org is not None, "only_own": caller.role == "starter"}
        return await self.change_of(caller, "run", runs.start, org, name, **what)

    async def run_now(self, caller: Caller, org: str, name: str, **what: Any) -> Run:
        """Run a definition now."""
        return (await self.start(caller, org, name, **what)).run

    async def add_credential(
        self, caller: Caller, org: str, *, secret: str | None = None, **what: Any
    ) -> CredentialRow:
        """Add a generation of an org's credentials: a secret, sealed here, or the name of its file."""
        what |= {"secret": secret, "secrets_dir": self._secrets_dir}
        return await self.change_of(caller, "credentials", self._add_credential, org, **what)

    def _add_credential(
        self, database: Database, org: str, *, secret: str | None, **what: Any
    ) -> CredentialRow:
        # Opened each time: its keys may have changed.
        ring = None if secret is None else self._open_ring()
        if secret is not None and ring is None:
            raise Conflict(
                "this process has no key ring to seal a secret",
                fix="send it to a worker's own port (`[web] listen` of `python -m worker run`), or use "
                "`credentials add` where the key ring is",
            )
        return credentials.add_credential(database, ring, org, secret=secret, **what)

    async def edit(
        self, caller: Caller, org: str, name: str, changes: Mapping[str, Any], **what: Any
    ) -> DefinitionDetail:
        """Change keys of a definition, as `definitions edit`."""
        return await self.change_of(caller, "edit", self._edit, org, name, changes, **what)

    async def approve(self, caller: Caller, pool: str, handler: str, digest: str) -> Row:
        """Approve what hosts of a pool declare of a handler."""
        return await self.change(caller, "approve", approvals.approve, pool, handler, digest)

    async def advance_rollout(
        self, caller: Caller, name: str, *, reason: str | None = None, anyway: bool = False
    ) -> RolloutDetail:
        """Begin the next step of a rollout."""
        advance = ROLLOUT_MOVES.require().advance
        return await self.change(caller, "rollout", advance, name, reason=reason, anyway=anyway)

    async def move_rollout(self, caller: Caller, name: str, verb: str, *, reason: str) -> RolloutDetail:
        """Halt, resume, finish or undo a rollout."""
        move = ROLLOUT_MOVES.require().move
        return await self.change(caller, "rollout", move, name, verb, reason=reason)

    async def planned_backfill(self, caller: Caller, org: str, name: str, **what: Any) -> PlannedBackfill:
        """What `backfill` would do; changes nothing."""
        _check_of(caller, "backfill", org)
        database = self._as(caller)
        return await database.run(backfills.planned_backfill, database, org, name, **what)

    async def plan(self, caller: Caller, change: str, arguments: Mapping[str, Any], *, at: datetime) -> Row:
        """Plan a change; changes nothing until `confirm`."""
        caller.require_may_plan(change)
        database = self._as(caller)
        make = partial(plans.make, token_sha256=caller.basis, at=at, actor=caller.actor)
        return await database.run(make, database, change, arguments)

    async def find_plan(self, caller: Caller, plan_id: str, *, at: datetime) -> Row:
        """An open plan of this operator."""
        # A link or a person can have an operator's name.
        if caller.kind != "operator":
            raise NotFound(
                f"there is no plan {plan_id:.80} of yours",
                fix="log in with the token of the operator whose client made it",
            )
        return await self.read(caller, partial(plans.find, plan_id=plan_id, operator=caller.actor, at=at))

    async def confirm(self, caller: Caller, plan_id: str, *, at: datetime) -> plans.Confirmed:
        """Do what an open plan of this operator says, once."""
        found = await self.find_plan(caller, plan_id, at=at)
        return await self.change(caller, PLANNED[found["change"]], plans.confirm, plan_id, at=at)

    async def change_many(self, caller: Caller, action: Literal["retry", "cancel"], many: Many) -> Bulk:
        """Retry the runs that match and were not retried yet, or cancel the unfinished ones; oldest first."""
        caller.require_may(action)
        database, which = self._as(caller), _FILTERS[action](query=many.query)
        place: bulk.BulkCursor | None
        most = min(many.limit, many.canary or MAX_LIMIT)
        if many.after is not None:
            place = bulk.BulkCursor.read(which, many.after)
        else:
            place = await database.run(bulk.begin, database, which, org=caller.org)
        rows: list[BulkRow] = []
        while place is not None and len(rows) < most:
            # In steps: others need the database's threads, too.
            done, place = await database.run(
                bulk.step,
                database,
                which,
                place,
                actor=caller.actor,
                org=caller.org,
                most=min(STEP, most - len(rows)),
                reason=many.reason,
                dry_run=many.dry_run,
            )
            rows += done
        return {
            "dry_run": many.dry_run,
            "canary": many.canary,
            "runs": rows,
            "next": None if place is None else str(place),
        }

    async def change_of(
        self, caller: Caller, action: Action, operation: Callable[..., T], org: str, *args: Any, **what: Any
    ) -> T:
        """Change something of this org."""
        _check_of(caller, action, org)
        return await self.change(caller, action, operation, org, *args, **what)

    async def change(
        self, caller: Caller, action: Action, operation: Callable[..., T], *args: Any, **what: Any
    ) -> T:
        """Change something, as this caller."""
        caller.require_may(action)
        database = self._as(caller)
        return await database.run(operation, database, *args, actor=caller.actor, **what)

    def _as(self, caller: Caller) -> Database:
        """The database in the caller's role; raises ValueError for an org that was not confirmed."""
        if caller.org is None:
            return self._database.acting(roles.ALL_ORGS)
        if caller.org_id is None:
            raise ValueError(f"org {caller.org} has no id here: its caller was not confirmed")
        return self._database.acting(roles.Scope.of_org(caller.org_id))
