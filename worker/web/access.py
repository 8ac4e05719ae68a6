"""Access: who calls, by bearer token, what they may do, and the database in their role."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Concatenate, Literal, ParamSpec, TypeVar

from sqlalchemy import Connection
from starlette.requests import HTTPConnection

from worker.errors import AccessDenied, NotFound, TokenError, TokenRefused, Unavailable
from worker.guard import Guard, bearer_token
from worker.ids import OrgId
from worker.store import roles
from worker.store.database import Database
from worker.store.orgs import OrgCaller
from worker.web.clients import Addresses, Limits

P = ParamSpec("P")
T = TypeVar("T")

Role = Literal["viewer", "operator", "admin"]
RANK: Mapping[Role, int] = {"viewer": 0, "operator": 1, "admin": 2}

# `orgs.find_caller` by the org's code and the token's client id.
FindCaller = Callable[[str, str], Awaitable[OrgCaller | None]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: an operator, or an org with its own token, which sees only its own data."""

    name: str
    role: Role
    org: str | None = None
    org_id: OrgId | None = None
    until: datetime | None = None
    # From an org's token, so that each later request of its session is checked again.
    issuer: str = ""
    client_id: str = ""
    has_org_scope: bool = False

    @property
    def actor(self) -> str:
        """The name in audit rows and as the origin of runs."""
        return f"operator:{self.name}" if self.org is None else f"org:{self.org}"

    @property
    def key(self) -> str:
        """What calls and sessions are counted by: an operator, or one client of an org."""
        return f"{self.actor} {self.client_id}"

    def require(self, role: Role) -> None:
        """Check that the caller has at least this role.

        Raises:
            AccessDenied: it has a lesser role.
        """
        if RANK[self.role] < RANK[role]:
            raise AccessDenied(
                f"this needs the role {role}; {self.actor} has {self.role}",
                fix="use another token, or grant the role: [[web.operators]] or web.org_role in worker.toml",
            )

    def org_asked_for(self, org: str | None) -> str | None:
        """The org to look at: the caller's own, or for operators the one asked for; None is all.

        Raises:
            NotFound: it is another org's, which does not exist for this caller.
        """
        if self.org is None or org is None or org == self.org:
            return self.org or org
        raise NotFound(f"there is no org {org}", fix=f"leave org out, or ask for your own: {self.org}")


class CallerDatabase:
    """The database in the role of a caller; the web side has no other access to it.

    On PostgreSQL the server then limits an org to its own rows and hides secrets from
    operators. SQLite has no roles: there each store function is given the org.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, caller: Caller) -> Database:
        """The database in the caller's role.

        Raises:
            ValueError: the caller is an org that was not confirmed.
        """
        if caller.org is None:
            return self._database.acting(roles.ALL_ORGS)
        if caller.org_id is None:
            raise ValueError(f"org {caller.org} has no id here: its caller was not confirmed")
        return self._database.acting(roles.Scope.of_org(caller.org_id))

    async def read(self, caller: Caller, work: Callable[[Connection], T]) -> T:
        """Run `work` in a database thread, in autocommit mode so that SQLite's writers do not wait."""
        return await self.of(caller).call_autocommit(work)

    async def change(
        self,
        caller: Caller,
        operation: Callable[Concatenate[Database, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an operation in a database thread.

        Raises:
            AccessDenied: the caller has a lesser role than operator.
        """
        caller.require("operator")
        database = self.of(caller)
        return await database.run(operation, database, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Operator:
    """A person or program that works for all orgs; `token_sha256` in lower-case hexadecimal."""

    name: str
    role: Role
    token_sha256: str


class Access:
    """Authenticates operators by the hash of their token, and orgs by their issuer's guard."""

    def __init__(
        self,
        operators: Sequence[Operator],
        guards: Mapping[str, Guard],
        find_caller: FindCaller,
        *,
        org_role: Role,
        org_scope: str = "",
        addresses: Addresses | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._operators = operators
        self._guards = guards
        self._find_caller = find_caller
        self._org_role = org_role
        self._org_scope = org_scope
        self.addresses = addresses or Addresses()
        self._limits = limits

    async def caller_of(self, connection: HTTPConnection) -> Caller | None:
        """The caller, by the header Authorization; None without one.

        Raises:
            TokenError: the token is invalid, or its client is not an active credential of its org.
            AccessDenied: the token is valid, but gives no access.
            TooManyRequests: too many invalid tokens came from this address.
            IssuerUnavailable: the issuer's keys cannot be read.
        """
        headers = connection.headers.getlist("authorization")
        if not headers:
            return None
        token = bearer_token(headers[0])
        if token is None or len(headers) > 1:
            self.count_stranger(connection)
            raise TokenError(
                "exactly one Authorization header with a bearer token is required",
                fix="send Authorization: Bearer TOKEN",
            )
        return await self._caller_with(token, connection)

    async def log_in(self, token: str, connection: HTTPConnection) -> Caller:
        """The caller with a login form's token, once `count_login` has counted it; raises as `caller_of`."""
        return await self._caller_with(token, connection, is_counted=True)

    async def _caller_with(
        self, token: str, connection: HTTPConnection, *, is_counted: bool = False
    ) -> Caller:
        client = self.addresses.client_of(connection)
        if not self._operators and not client.is_local:
            self.count_stranger(connection)
            raise AccessDenied(
                "without an operator only requests from this machine are served",
                fix="add one to [[web.operators]] in worker.toml",
            )
        limits = None if is_counted else self._limits
        if limits is not None:
            limits.token(token, client)
        try:
            caller = self._operator(token) or await self._org(token)
        except TokenError:
            if limits is not None:
                limits.was_bad(token, client)
            raise
        if limits is not None:
            limits.was_good(token, client)
        return await self.confirm(caller)

    async def confirm(self, caller: Caller) -> Caller:
        """Count a call, and check in the database that the caller still has access.

        Raises:
            AccessDenied: its org is unknown, suspended or removed.
            TokenError: its token's client is not an active credential of the org, and the token
                lacks `[web] org_scope`.
            TooManyRequests: it calls too often.
        """
        if self._limits is not None:
            self._limits.caller(caller.key, caller.actor)
        if caller.org is None:
            return caller
        found = await self._find_caller(caller.org, caller.client_id)
        # Another issuer may have an org of the same code.
        if found is None or found.issuer != caller.issuer or found.state not in ("active", "paused"):
            raise AccessDenied(
                f"org {caller.org} may not use this worker",
                fix="`orgs list` shows the known orgs with their issuers and states",
            )
        if not (found.is_credential or caller.has_org_scope):
            raise TokenError(
                f"the token's client is not an active credential of org {caller.org}",
                fix=f"request the token with a client of `credentials list {caller.org} --state active`, "
                "or set web.org_scope in worker.toml to a scope that the token has",
            )
        return replace(caller, org_id=found.id)

    def count_login(self, connection: HTTPConnection) -> None:
        """Count a login.

        Raises:
            TooManyRequests: too many came from this address.
        """
        if self._limits is not None:
            self._limits.login(self.addresses.client_of(connection))

    def count_stranger(self, connection: HTTPConnection) -> None:
        """Count a request without a token or session; raises as `count_login` does."""
        if self._limits is not None:
            self._limits.stranger(self.addresses.client_of(connection))

    def _operator(self, token: str) -> Caller | None:
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        # All are compared, so that the time taken does not reveal which one matched.
        for operator in self._operators:
            if hmac.compare_digest(operator.token_sha256, digest):
                found = Caller(operator.name, operator.role)
        return found

    async def _org(self, token: str) -> Caller:
        """The org that the token was issued for. `confirm` checks whether it has access."""
        fault: TokenRefused | Unavailable | None = None
        for issuer, guard in self._guards.items():
            try:
                claims = await guard.check(token)
            except Unavailable as unavailable:
                fault = unavailable
            except TokenRefused as refused:
                fault = fault or refused
            else:
                code = claims.org_code
                return Caller(
                    code,
                    self._org_role,
                    org=code,
                    until=claims.expires_at,
                    issuer=issuer,
                    client_id=claims.client_id,
                    has_org_scope=bool(self._org_scope) and self._org_scope in claims.scopes,
                )
        if isinstance(fault, Unavailable):
            raise fault
        raise TokenError(
            "the token is invalid",
            fix="send an operator's token, or a current one of a configured issuer and its audience",
        )
