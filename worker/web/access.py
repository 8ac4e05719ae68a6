"""Access: who asks, by their bearer token, and what they may see and do."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
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
    ) -> None:
        self._operators = operators
        self._guards = guards
        self._find_caller = find_caller
        self._org_role = org_role
        self._org_scope = org_scope

    async def caller_of(self, connection: HTTPConnection) -> Caller | None:
        """Who asks, by the header Authorization; None without one.

        Raises:
            TokenError: the token does not hold.
            AccessDenied: it holds, but lets nobody in here.
            IssuerUnavailable: nobody can say, since the issuer's keys cannot be read.
        """
        headers = connection.headers.getlist("authorization")
        if not headers:
            return None
        match = _BEARER.fullmatch(headers[0].strip())
        if match is None or len(headers) > 1:
            raise TokenError(
                "one header Authorization with a bearer token is needed",
                fix="send Authorization: Bearer TOKEN",
            )
        return await self.caller_with(match[1], connection)

    async def caller_with(self, token: str, connection: HTTPConnection) -> Caller:
        """Who this token is of; raises as `caller_of` does."""
        if not self._operators and not _is_local(connection):
            raise AccessDenied(
                "only this machine is served as long as there is no operator",
                fix="add one to [[web.operators]] of worker.toml",
            )
        return self._operator(token) or await self._org(token)

    def _operator(self, token: str) -> Caller | None:
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        # All are compared, so that the time taken tells nothing of where one matched.
        for operator in self._operators:
            if hmac.compare_digest(operator.token_sha256, digest):
                found = Caller(operator.name, operator.role)
        return found

    async def _org(self, token: str) -> Caller:
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
                return await self.confirm(
                    Caller(
                        code,
                        self._org_role,
                        org=code,
                        until=claims.expires_at,
                        issuer=issuer,
                        client_id=claims.client_id,
                        has_org_scope=bool(self._org_scope) and self._org_scope in claims.scopes,
                    )
                )
        if isinstance(fault, Unavailable):
            raise fault
        raise TokenError(
            "the token does not hold",
            fix="send an operator's, or one that a configured issuer has just issued for its audience",
        )

    async def confirm(self, caller: Caller) -> Caller:
        """This caller, if the database still lets it in; its token's signature is not looked at again.

        Raises:
            AccessDenied: its org is not known, suspended or removed.
            TokenError: its token's client is no active credential of the org, and it lacks `[web] org_scope`.
        """
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


def _is_local(connection: HTTPConnection) -> bool:
    try:
        address = ipaddress.ip_address(connection.client.host if connection.client else "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
