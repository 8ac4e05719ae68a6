"""Access: authenticates each request, by bearer token or session, and counts its calls."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from typing import Literal

from starlette.requests import HTTPConnection
from starlette.routing import Match, Route

from worker.clock import Clock
from worker.errors import AccessDenied, TokenError, TokenRefused, Unavailable
from worker.features.console.api.endpoints import BASE, ENDPOINTS
from worker.features.console.callers import Caller, Role
from worker.features.console.mcp import PATH as MCP
from worker.features.console.operators import CLIENT_PREFIX, TOKEN_PREFIX
from worker.guard import Guard, bearer_token
from worker.kit.web.clients import Addresses, ClientLimits
from worker.store import roles, sign_in
from worker.store.database import Database
from worker.store.orgs import OrgCaller

OperatorRole = Literal["starter", "viewer", "operator", "admin"]

# What a starter may call; everything else is denied before it is routed.
_FOR_STARTERS = [
    Route(f"{BASE}{one.path}", lambda request: None, methods=[one.method])
    for one in ENDPOINTS
    if one.for_starters
]

# Seconds for which it is remembered that the database has operators, or none.
REMEMBERED = 2.0


@dataclass(frozen=True, slots=True)
class Operator:
    """A person or program that works for all orgs; `token_sha256` in lower-case hexadecimal."""

    name: str
    role: OperatorRole
    token_sha256: str = field(repr=False)


class StoredOperators:
    """The operators of the database. Each lookup reads it, so a change is in force at once."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database.acting(roles.ALL_ORGS)
        self._clock = clock
        self._has_any = False
        self._read_at = float("-inf")

    async def find(self, token_sha256: str) -> Operator | None:
        """The operator with this token; raises StoreUnavailable."""
        row = await self._database.call_autocommit(sign_in.find_operator, token_sha256)
        return None if row is None else Operator(row["name"], row["role"], token_sha256)

    async def find_of_client(self, token_sha256: str) -> Operator | None:
        """The operator whose MCP client has this token; raises StoreUnavailable."""
        row = await self._database.call_autocommit(sign_in.find_operator_of_client, token_sha256)
        return None if row is None else Operator(row["name"], row["role"], token_sha256)

    async def has_any(self) -> bool:
        """Whether there is any, at most REMEMBERED seconds ago; raises StoreUnavailable."""
        now = self._clock.monotonic()
        if now - self._read_at >= REMEMBERED:
            self._has_any = await self._database.call_autocommit(sign_in.has_operators)
            self._read_at = now
        return self._has_any


class Operators:
    """Finds operators by the hash of their token: those of worker.toml first, without the database."""

    def __init__(self, configured: Sequence[Operator], stored: StoredOperators | None = None) -> None:
        self._configured = configured
        self._stored = stored

    async def with_token(self, token: str) -> Operator | None:
        """The operator with this token; raises StoreUnavailable if only the database can tell."""
        digest = sign_in.sha256(token)
        found = self._in_file(digest)
        # Other tokens, such as those of orgs, need no lookup.
        if found is None and token.startswith(TOKEN_PREFIX):
            return await self._in_database(digest)
        return found

    async def of_client(self, token: str) -> Operator | None:
        """The operator whose MCP client has this token; raises StoreUnavailable."""
        if self._stored is None or not token.startswith(CLIENT_PREFIX):
            return None
        return await self._stored.find_of_client(sign_in.sha256(token))

    async def with_hash(self, token_sha256: str) -> Operator | None:
        """The operator whose token has this hash; raises as `with_token`."""
        return self._in_file(token_sha256) or await self._in_database(token_sha256)

    async def has_any(self) -> bool:
        """Whether there is any; raises as `with_token`."""
        return bool(self._configured) or (self._stored is not None and await self._stored.has_any())

    def _in_file(self, digest: str) -> Operator | None:
        found = None
        # All are compared, so that the time taken does not reveal which one matched.
        for operator in self._configured:
            if hmac.compare_digest(operator.token_sha256, digest):
                found = operator
        return found

    async def _in_database(self, digest: str) -> Operator | None:
        return None if self._stored is None else await self._stored.find(digest)


def _check_may_log_in(caller: Caller) -> None:
    if caller.is_client:
        raise AccessDenied(
            f"this is the token of an MCP client of {caller.actor}, which opens no session",
            fix="log in with the operator's own token",
        )
    if caller.role == "starter":
        raise AccessDenied(
            f"{caller.actor} has the role starter, which opens no session",
            fix="log in with the token of an operator with another role",
        )


# `orgs.find_caller` by the org's code and the token's client id.
FindCaller = Callable[[str, str], Awaitable[OrgCaller | None]]


@dataclass(eq=False, repr=False)
class Access:
    """Authenticates operators by the hash of their token, and orgs by their issuer's guard.

    `login_basis` is a hash of the rules by which people log in, or empty if they cannot. `portal`
    is what managers may do.
    """

    operators: InitVar[Sequence[Operator]]
    guards: Mapping[str, Guard]
    find_caller: FindCaller
    _: KW_ONLY
    org_role: Role
    org_scope: str = ""
    limits: ClientLimits
    addresses: Addresses = field(default_factory=Addresses)
    stored: InitVar[StoredOperators | None] = None
    login_basis: str = ""
    portal: Iterable[str] = ()

    def __post_init__(self, operators: Sequence[Operator], stored: StoredOperators | None) -> None:
        self._operators = Operators(operators, stored)
        # A session keeps only this of the scope that its token had.
        self._scope_basis = sign_in.sha256(self.org_scope) if self.org_scope else ""

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
        caller = await self._caller_with(token, connection)
        if caller.role == "starter" and not any(
            route.matches(connection.scope)[0] is Match.FULL for route in _FOR_STARTERS
        ):
            raise AccessDenied(
                f"{caller.actor} has the role starter, which only starts runs and reads those",
                fix="use the token of an operator with another role",
            )
        if caller.is_client and connection.scope["path"] != MCP:
            raise AccessDenied(
                f"this is the token of an MCP client of {caller.actor}, which may ask {MCP} only",
                fix="use the operator's own token",
            )
        return caller

    async def log_in(self, token: str, connection: HTTPConnection) -> Caller:
        """The caller with this token, after `count_login`; raises as `caller_of`, and for a starter."""
        caller = await self._caller_with(token, connection, is_counted=True)
        _check_may_log_in(caller)
        return caller

    async def _caller_with(
        self, token: str, connection: HTTPConnection, *, is_counted: bool = False
    ) -> Caller:
        client = self.addresses.client_of(connection)
        if not (client.is_local or self.login_basis or await self._operators.has_any()):
            self.count_stranger(connection)
            raise AccessDenied(
                "without an operator only requests from this machine are served",
                fix="add one with `operators add`, or to [[web.operators]] in worker.toml",
            )
        if is_counted:
            return await self.confirm(await self._operator(token) or await self._org(token))
        self.limits.token(token, client)
        try:
            caller = await self._operator(token) or await self._org(token)
        except TokenError:
            self.limits.was_bad(token, client)
            raise
        self.limits.was_good(token, client)
        return await self.confirm(caller)

    async def confirm_session(self, caller: Caller) -> Caller:
        """As `confirm`, for the caller of a session: by what the settings say now, not at the login.

        Raises:
            TokenError: the operator's token is gone, the rules for logins have changed, or the session
                rested on another `[web] org_scope`.
        """
        if caller.kind == "operator":
            operator = await self._operators.with_hash(caller.basis)
            if operator is None:
                raise TokenError("the token of this session was removed", fix="log in with another token")
            caller = replace(caller, name=operator.name, role=operator.role)
            _check_may_log_in(caller)
        if caller.kind == "org":
            # Sessions of the previous release name no scope: they rest on the credential alone.
            has_scope = caller.has_org_scope and caller.basis == self._scope_basis != ""
            caller = replace(caller, role=self.org_role, has_org_scope=has_scope)
        if caller.kind == "person" and caller.basis != self.login_basis:
            raise TokenError("the rules for logins have changed", fix="log in again")
        return await self.confirm(caller)

    async def confirm(self, caller: Caller) -> Caller:
        """Count a call, and check in the database that the caller still has access.

        Raises:
            AccessDenied: its org is unknown, suspended or removed.
            TokenError: its token's client is not an active credential of the org, and the token
                lacks `[web] org_scope`.
            TooManyRequests: it calls too often.
        """
        self.limits.caller(caller.key, caller.actor)
        if caller.org is None:
            return caller
        found = await self.find_caller(caller.org, caller.client_id)
        # Another issuer may have an org of the same code.
        if found is None or found.issuer != caller.issuer or found.state not in ("active", "paused"):
            raise AccessDenied(
                f"org {caller.org} may not use this worker",
                fix="`orgs list` shows the known orgs with their issuers and states",
            )
        if caller.kind == "person":
            return replace(caller, org_id=found.id, portal=frozenset(self.portal))
        if not (found.is_credential or caller.has_org_scope):
            raise TokenError(
                f"the token's client is not an active credential of org {caller.org}",
                fix=f"request the token with a client of `credentials list {caller.org} --state active`, "
                "or set web.org_scope in worker.toml to a scope that the token has",
            )
        return replace(caller, org_id=found.id)

    def count_login(self, connection: HTTPConnection) -> None:
        """Count a login; raises TooManyRequests at the limit of its address."""
        self.limits.login(self.addresses.client_of(connection))

    def count_stranger(self, connection: HTTPConnection) -> None:
        """Count a request without a token or session; raises as `count_login` does."""
        self.limits.stranger(self.addresses.client_of(connection))

    async def _operator(self, token: str) -> Caller | None:
        of_client = await self._operators.of_client(token)
        operator = of_client or await self._operators.with_token(token)
        if operator is None:
            return None
        is_client = of_client is not None
        return Caller(operator.name, operator.role, basis=operator.token_sha256, is_client=is_client)

    async def _org(self, token: str) -> Caller:
        """The org that the token was issued for. `confirm` checks whether it has access."""
        fault: TokenRefused | Unavailable | None = None
        for issuer, guard in self.guards.items():
            try:
                claims = await guard.check(token)
            except Unavailable as unavailable:
                fault = unavailable
            except TokenRefused as refused:
                fault = fault or refused
            else:
                code = claims.org_code
                has_scope = bool(self.org_scope) and self.org_scope in claims.scopes
                return Caller(
                    code,
                    self.org_role,
                    org=code,
                    kind="org",
                    until=claims.expires_at,
                    issuer=issuer,
                    client_id=claims.client_id,
                    has_org_scope=has_scope,
                    basis=self._scope_basis if has_scope else "",
                )
        if isinstance(fault, Unavailable):
            raise fault
        raise TokenError(
            "the token is invalid",
            fix="send an operator's token, or a current one of a configured issuer and its audience",
        )
