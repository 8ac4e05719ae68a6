"""Callers: who calls, what they may do, and the database in their role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from sqlalchemy import Connection

from worker.definitions.origins import NO_ISSUERS, IssuerOrigins
from worker.errors import AccessDenied, Conflict, NotFound
from worker.ids import ALL_ORGS, OrgId, OrgScope
from worker.operations import bulk
from worker.operations.answers import answer
from worker.operations.approvals import approve
from worker.operations.backfill import backfill, planned_backfill
from worker.operations.budgets import raise_budget
from worker.operations.credentials import add_credential, retire_credential
from worker.operations.definitions import edit_definition, pause_definition, resume_definition
from worker.operations.orgs import set_org_state
from worker.operations.runs import cancel, retry, run_now
from worker.operations.states import clear_state, set_state
from worker.search import Query
from worker.store import roles
from worker.store.database import Database
from worker.store.edit_runs import Cancellable, Retryable
from worker.store.lists import MAX_LIMIT
from worker.store.lists.read import DefinitionState
from worker.store.lists.redaction import Row, redacted
from worker.store.lists.rows import (
    Backfill,
    Bulk,
    BulkRow,
    CredentialRow,
    DefinitionDetail,
    OrgDetail,
    PlannedBackfill,
    Run,
    WaitRow,
)
from worker.store.lists.usage import Raise

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# Opens the key ring; None in a process that has none.
OpenRing = Callable[[], "KeyRing | None"]
# Runs that one step of a bulk change takes.
STEP = 20
T = TypeVar("T")
P = ParamSpec("P")

# `member` and `manager` are roles of people in their own org.
Role = Literal["viewer", "operator", "admin", "member", "manager"]
RANK: Mapping[Role, int] = {"member": 0, "manager": 0, "viewer": 0, "operator": 1, "admin": 2}
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
]
BY_ADMINS: frozenset[Action] = frozenset({"credentials", "approve"})
BY_ORGS: frozenset[Action] = frozenset({"run", "retry", "cancel", "pause", "answer"})


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
    # What a manager may do.
    portal: frozenset[str] = frozenset()

    @property
    def actor(self) -> str:
        """The name in audit rows and as the origin of runs."""
        if self.kind == "person":
            return f"person:{self.subject}@{self.home}"
        return f"operator:{self.name}" if self.org is None else f"org:{self.org}"

    @property
    def key(self) -> str:
        """What calls and sessions are counted by: an operator, or one client of an org."""
        return f"{self.actor} {self.client_id}"

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


class CallerDatabase:
    """The database in the role of a caller; the web side has no other access to it.

    On PostgreSQL the server then limits an org to its own rows and hides secrets from
    operators. SQLite has no roles: there each store function is given the org. `inline`,
    `insecure_origins` and `api_origins` are those of the settings: what an edited definition is
    checked against.
    `open_ring` opens the key ring that seals new secrets, if this process may have one, and
    `secrets_dir` is the folder that holds secrets in files.

    Each change raises as its operation, AccessDenied if the caller may not do it, and
    NotFound for what belongs to another org. A `reason` is kept in the audit row.
    """

    def __init__(
        self,
        database: Database,
        *,
        inline: Collection[str] = (),
        insecure_origins: Collection[str] = (),
        api_origins: IssuerOrigins = NO_ISSUERS,
        open_ring: OpenRing = no_ring,
        secrets_dir: Path | None = None,
    ) -> None:
        self._database = database
        self._inline = inline
        self._insecure_origins = insecure_origins
        self._api_origins = api_origins
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

    async def cancel(self, caller: Caller, run: str, *, reason: str | None = None) -> Run:
        """Cancel a run."""
        return await self._change(caller, "cancel", cancel, run, org=caller.org, reason=reason)

    async def retry(
        self,
        caller: Caller,
        run: str,
        *,
        from_checkpoint: bool = False,
        again: bool = False,
        reason: str | None = None,
    ) -> Run:
        """Retry an ended run; one that was retried already only with `again`."""
        what = {"from_checkpoint": from_checkpoint, "again": again, "reason": reason}
        by_org = caller.org is not None
        return await self._change(caller, "retry", retry, run, org=caller.org, by_org=by_org, **what)

    async def answer(self, caller: Caller, run: str, name: str, *, data: Any, occurrence: int = 1) -> WaitRow:
        """Answer what a run waits for."""
        what = {"occurrence": occurrence, "org": caller.org}
        return await self._change(caller, "answer", answer, run, name, data, **what)

    async def run_now(
        self,
        caller: Caller,
        org: str,
        name: str,
        *,
        request_key: str | None = None,
        params: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> Run:
        """Run a definition now."""
        what = {"request_key": request_key, "params": params, "reason": reason}
        by_org = caller.org is not None
        return await self._change_of(caller, "run", run_now, org, name, by_org=by_org, **what)

    async def pause(
        self, caller: Caller, org: str, name: str, *, note: str | None = None
    ) -> DefinitionDetail:
        """Pause a definition."""
        return await self._change_of(caller, "pause", pause_definition, org, name, note=note)

    async def resume(self, caller: Caller, org: str, name: str) -> DefinitionDetail:
        """Resume a paused definition."""
        return await self._change_of(caller, "pause", resume_definition, org, name)

    async def pause_org(self, caller: Caller, org: str, *, note: str | None = None) -> OrgDetail:
        """Pause an org: none of its runs fires or starts."""
        return await self._change_of(caller, "pause_org", set_org_state, org, "paused", note=note)

    async def resume_org(self, caller: Caller, org: str, *, note: str | None = None) -> OrgDetail:
        """Resume a paused or suspended org from now on."""
        return await self._change_of(caller, "pause_org", set_org_state, org, "active", note=note)

    async def add_credential(
        self,
        caller: Caller,
        org: str,
        *,
        client_id: str,
        secret: str | None = None,
        reference: str | None = None,
        kind: str = "client_secret",
    ) -> CredentialRow:
        """Add a generation of an org's credentials: a secret, sealed here, or the name of its file."""
        what = {"client_id": client_id, "secret": secret, "reference": reference, "kind": kind}
        return await self._change_of(caller, "credentials", self._add_credential, org, **what)

    def _add_credential(
        self, database: Database, org: str, *, secret: str | None, actor: str, **what: Any
    ) -> CredentialRow:
        # Opened each time: its keys may have changed.
        ring = None if secret is None else self._open_ring()
        if secret is not None and ring is None:
            raise Conflict(
                "this process has no key ring to seal a secret",
                fix="send it to a worker's own port (`[web] listen` of `python -m worker run`), or use "
                "`credentials add` where the key ring is",
            )
        return add_credential(
            database, ring, org, secret=secret, secrets_dir=self._secrets_dir, actor=actor, **what
        )

    async def retire_credential(self, caller: Caller, org: str, generation: int) -> CredentialRow:
        """Retire a generation, so that no token is requested with it."""
        return await self._change_of(caller, "credentials", retire_credential, org, generation)

    async def raise_budget(
        self,
        caller: Caller,
        org: str,
        *,
        meter: str,
        by: int,
        per: str,
        until: datetime | None = None,
        reason: str | None = None,
    ) -> Raise:
        """Raise an org's budgets of a meter and period."""
        what = {"by": by, "per": per, "until": until, "reason": reason}
        return await self._change_of(caller, "budget", raise_budget, org, meter, **what)

    async def edit(
        self,
        caller: Caller,
        org: str,
        name: str,
        changes: Mapping[str, Any],
        *,
        revision: int | None = None,
        reason: str | None = None,
    ) -> DefinitionDetail:
        """Change keys of a definition, as `definitions edit`; with `revision`, only if it is at that one."""
        allowed = {
            "inline": self._inline,
            "insecure_origins": self._insecure_origins,
            "api_origins": self._api_origins,
        }
        what = {"revision": revision, "reason": reason, **allowed}
        return await self._change_of(caller, "edit", edit_definition, org, name, changes, **what)

    async def approve(self, caller: Caller, pool: str, handler: str, digest: str) -> Row:
        """Approve what hosts of a pool declare of a handler."""
        return await self._change(caller, "approve", approve, pool, handler, digest)

    async def set_state(
        self, caller: Caller, org: str, name: str, data: Mapping[str, Any]
    ) -> DefinitionState:
        """Replace the state of a definition."""
        return await self._change_of(caller, "state", set_state, org, name, data)

    async def clear_state(self, caller: Caller, org: str, name: str) -> DefinitionState:
        """Clear the state of a definition."""
        return await self._change_of(caller, "state", clear_state, org, name)

    async def backfill(
        self,
        caller: Caller,
        org: str,
        name: str,
        since: datetime,
        until: datetime,
        *,
        limit: int = 1,
        reason: str | None = None,
    ) -> Backfill:
        """Run each scheduled time from `since` until before `until` again."""
        what = {"start": since, "until": until, "limit": limit, "reason": reason}
        return await self._change_of(caller, "backfill", backfill, org, name, **what)

    async def planned_backfill(
        self, caller: Caller, org: str, name: str, since: datetime, until: datetime, *, limit: int = 1
    ) -> PlannedBackfill:
        """What `backfill` would do; changes nothing."""
        self._check_of(caller, "backfill", org)
        database = self._as(caller)
        return await database.run(
            planned_backfill, database, org, name, start=since, until=until, limit=limit
        )

    async def retry_many(self, caller: Caller, many: Many) -> Bulk:
        """Retry the runs that match and were not retried yet, oldest end first."""
        by_org = caller.org is not None
        change = partial(retry, actor=caller.actor, org=caller.org, by_org=by_org, reason=many.reason)
        return await self._many(caller, "retry", Retryable(query=many.query), change, many)

    async def cancel_many(self, caller: Caller, many: Many) -> Bulk:
        """Cancel the unfinished runs that match, oldest first."""
        which = Cancellable(query=many.query)
        change = partial(cancel, actor=caller.actor, org=caller.org, states=which.states, reason=many.reason)
        return await self._many(caller, "cancel", which, change, many)

    async def _many(
        self,
        caller: Caller,
        action: Action,
        which: Cancellable | Retryable,
        change: Callable[..., Run],
        many: Many,
    ) -> Bulk:
        caller.require_may(action)
        database = self._as(caller)
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
                org=caller.org,
                most=min(STEP, most - len(rows)),
                change=None if many.dry_run else partial(change, database),
            )
            rows += done
        return {
            "dry_run": many.dry_run,
            "canary": many.canary,
            "runs": rows,
            "next": None if place is None else str(place),
        }

    async def _change_of(
        self, caller: Caller, action: Action, operation: Callable[..., T], org: str, *args: Any, **kwargs: Any
    ) -> T:
        """Change something of this org."""
        self._check_of(caller, action, org)
        return await self._change(caller, action, operation, org, *args, **kwargs)

    async def _change(
        self, caller: Caller, action: Action, operation: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        caller.require_may(action)
        database = self._as(caller)
        return await database.run(operation, database, *args, actor=caller.actor, **kwargs)

    @staticmethod
    def _check_of(caller: Caller, action: Action, org: str) -> None:
        # First: for an org, what belongs to another org does not exist.
        caller.scope(org)
        caller.require_may(action)

    def _as(self, caller: Caller) -> Database:
        """The database in the caller's role; raises ValueError for an org that was not confirmed."""
        if caller.org is None:
            return self._database.acting(roles.ALL_ORGS)
        if caller.org_id is None:
            raise ValueError(f"org {caller.org} has no id here: its caller was not confirmed")
        return self._database.acting(roles.Scope.of_org(caller.org_id))
