"""Access: who asks, by their bearer token, and what they may see and do."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from starlette.requests import HTTPConnection

from worker.errors import AccessDenied, NotFound, TokenError, TokenRefused, Unavailable
from worker.guard import Guard
from worker.ids import OrgId
from worker.store.orgs import OrgCaller
from worker.web.addresses import Addresses
from worker.web.limits import Limits

Role = Literal["viewer", "operator", "admin"]
RANK: Mapping[Role, int] = {"viewer": 0, "operator": 1, "admin": 2}


# `orgs.find_caller` by the org's code and the token's client id.
FindCaller = Callable[[str, str], Awaitable[OrgCaller | None]]

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: an operator, or an org by its own token, which sees that org only."""

    name: str
    role: Role
    org: str | None = None
    org_id: OrgId | None = None
    until: datetime | None = None
    # Of an org: what its token said, so that each later request of its session is checked by it again.
    issuer: str = ""
    client_id: str = ""
    has_org_scope: bool = False

    @property
    def actor(self) -> str:
        """The name in audit rows and as the maker of runs."""
        return f"operator:{self.name}" if self.org is None else f"org:{self.org}"

    @property
    def key(self) -> str:
        """Tells callers apart where calls and sessions are counted: an operator, or one client of an org."""
        return f"{self.actor} {self.client_id}"

    def require(self, role: Role) -> None:
        """Let through who has at least this role.

        Raises:
            AccessDenied: the caller has less.
        """
        if RANK[self.role] < RANK[role]:
            raise AccessDenied(
                f"this needs the role {role}; {self.actor} has {self.role}",
                fix="ask as another, or give that role: [[web.operators]] or web.org_role of worker.toml",
            )

    def org_asked_for(self, org: str | None) -> str | None:
        """The org to look at: the caller's own, or for operators the one asked for; None is all.

        Raises:
            NotFound: it is another org's: to this caller it does not exist.
        """
        if self.org is None or org is None or org == self.org:
            return self.org or org
        raise NotFound(f"there is no org {org}", fix=f"leave org out, or ask for your own: {self.org}")


@dataclass(frozen=True, slots=True)
class Operator:
    """A person or program that works for all orgs; `token_sha256` in lower-case hexadecimal."""

    name: str
    role: Role
    token_sha256: str


class Access:
    """Knows operators by the hash of their token, and orgs by what their issuer's guard says."""

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
        """Who asks, by the header Authorization; None without one.

        Raises:
            TokenError: the token is invalid, or its client is not an active credential of its org.
            AccessDenied: it is good, but lets nobody in here.
            TooManyRequests: too many bad tokens came from this address.
            IssuerUnavailable: nobody can say, since the issuer's keys cannot be read.
        """
        headers = connection.headers.getlist("authorization")
        if not headers:
            return None
        match = _BEARER.fullmatch(headers[0].strip())
        if match is None or len(headers) > 1:
            self.count_stranger(connection)
            raise TokenError(
                "one header Authorization with a bearer token is needed",
                fix="send Authorization: Bearer TOKEN",
            )
        return await self._caller_with(match[1], connection)

    async def log_in(self, token: str, connection: HTTPConnection) -> Caller:
        """Who this token of a login form is of, once `count_login` has counted it; raises as `caller_of`."""
        return await self._caller_with(token, connection, is_counted=True)

    async def _caller_with(
        self, token: str, connection: HTTPConnection, *, is_counted: bool = False
    ) -> Caller:
        client = self.addresses.client_of(connection)
        if not self._operators and not client.is_local:
            self.count_stranger(connection)
            raise AccessDenied(
                "only this machine is served as long as there is no operator",
                fix="add one to [[web.operators]] of worker.toml",
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
        """Count a call of this caller, and see that the database still lets it in.

        Raises:
            AccessDenied: its org is not known, suspended or removed.
            TokenError: its token's client is no active credential of the org, and it lacks `[web] org_scope`.
            TooManyRequests: it calls too often.
        """
        if self._limits is not None:
            self._limits.caller(caller.key, caller.actor)
        if caller.org is None:
            return caller
        found = await self._find_caller(caller.org, caller.client_id)
        # Another issuer may call an org of its own the same.
        if found is None or found.issuer != caller.issuer or found.state not in ("active", "paused"):
            raise AccessDenied(
                f"org {caller.org} may not use this worker",
                fix="`orgs list` shows those that are known, their issuers and states",
            )
        if not (found.is_credential or caller.has_org_scope):
            raise TokenError(
                f"the token's client is not an active credential of org {caller.org}",
                fix=f"ask for the token with a client of `credentials list {caller.org} --state active`, "
                "or set web.org_scope in worker.toml to a scope that the token has",
            )
        return replace(caller, org_id=found.id)

    def count_login(self, connection: HTTPConnection) -> None:
        """Count a try to log in.

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
        # All are compared, so that the time taken tells nothing of where one matched.
        for operator in self._operators:
            if hmac.compare_digest(operator.token_sha256, digest):
                found = Caller(operator.name, operator.role)
        return found

    async def _org(self, token: str) -> Caller:
        """The org that the token was issued for. Whether it may call is checked by `confirm`."""
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
            fix="send an operator's, or one that a configured issuer has just issued for its audience",
        )
