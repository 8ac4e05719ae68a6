"""Access: what every form of the guard asks of a request, and its response to one without (RFC 6750)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .claims import Claims
from .errors import ConfigurationError, TokenRefused, Unavailable
from .guard import Guard, texts
from .issuer import Issuer

A = TypeVar("A")  # an application
R = TypeVar("R")  # a request, as the framework has it

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
RETRY_AFTER = "5"  # seconds


def bearer_token(header: str) -> str | None:
    """The token of an Authorization header (RFC 6750, section 2.1); None if it has none."""
    match = _BEARER.fullmatch(header.strip())
    return match[1] if match else None


def parted(joined: str | None) -> list[str]:
    """The Authorization headers in one value.

    WSGI servers and Django join headers of one name by a comma, which no bearer token has.
    """
    return [] if joined is None else joined.split(",")


@dataclass(eq=False)
class Denied(Exception):
    """The response to a request without access."""

    status: int
    error: str
    description: str
    scope: str = ""

    @property
    def content(self) -> dict[str, str]:
        """The JSON object of the body."""
        return {"error": self.error or "unauthorized", "error_description": self.description}

    @property
    def body(self) -> bytes:
        return json.dumps(self.content).encode()

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response, with the challenge (RFC 6750, section 3)."""
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        if self.status == 503:
            return headers | {"Retry-After": RETRY_AFTER}
        return headers | {"WWW-Authenticate": self._challenge()}

    def _challenge(self) -> str:
        parts = ['realm="api"']
        if self.error:
            parts += [f'error="{self.error}"', f'error_description="{self.description}"']
        if self.scope:
            parts.append(f'scope="{self.scope}"')
        return "Bearer " + ", ".join(parts)


class AccessRules(Generic[R]):
    """What a request needs: a valid token, with these scopes, of its org and its client.

    `org_of`, `client_of` and `scopes_of` get the request. None from one of the first two means any.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        scopes: Iterable[str] = (),
        org_of: Callable[[R], str | None] | None = None,
        client_of: Callable[[R], str | None] | None = None,
        scopes_of: Callable[[R], Iterable[str]] | None = None,
    ) -> None:
        self._guard = guard
        self._scopes = frozenset(texts("scopes", scopes))
        self._org_of = org_of
        self._client_of = client_of
        self._scopes_of = scopes_of

    async def claims(self, request: R, headers: Sequence[str]) -> Claims:
        """The claims of the request's token; `headers` are its Authorization headers. Raises Denied."""
        with _denials():
            return await self._guard.check(_token_of(headers), **self._wanted(request))

    async def claims_threadsafe(self, request: R, headers: Sequence[str]) -> Claims:
        """As `claims`, on any event loop."""
        with _denials():
            return await self._guard.check_threadsafe(_token_of(headers), **self._wanted(request))

    def claims_sync(self, request: R, headers: Sequence[str]) -> Claims:
        """As `claims`, on any thread."""
        with _denials():
            return self._guard.check_sync(_token_of(headers), **self._wanted(request))

    def _wanted(self, request: R) -> dict[str, Any]:
        return {
            "org_code": self._org_of(request) if self._org_of else None,
            "client_id": self._client_of(request) if self._client_of else None,
            "scopes": self._scopes.union(self._scopes_of(request) if self._scopes_of else ()),
        }


class Middleware(Generic[A, R]):
    """What the middlewares for ASGI and WSGI are made from: an application, and what its requests need."""

    def __init__(
        self,
        app: A,
        guard: Guard | None = None,
        *,
        issuer: str | Issuer = "",
        audience: str = "",
        profile: str = "kinde",
        scopes: Iterable[str] = (),
        org_of: Callable[[R], str | None] | None = None,
        client_of: Callable[[R], str | None] | None = None,
        scopes_of: Callable[[R], Iterable[str]] | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        self._app = app
        guard = guard_of(guard, issuer, audience, profile)
        self._rules = AccessRules(
            guard, scopes=scopes, org_of=org_of, client_of=client_of, scopes_of=scopes_of
        )
        self._open_paths = frozenset(texts("open_paths", open_paths))


def guard_of(guard: Guard | None, issuer: str | Issuer, audience: str, profile: str) -> Guard:
    """The given guard, or one made from the other parameters; raises ConfigurationError."""
    if guard is None:
        return Guard(issuer, audience=audience, profile=profile)
    if not isinstance(guard, Guard):
        raise ConfigurationError(
            f"the first parameter is a guard, not {type(guard).__name__}",
            fix="write @require_token(guard), or @require_token(issuer=…, audience=…)",
        )
    return guard


def _token_of(headers: Sequence[str]) -> str:
    if len(headers) > 1:
        raise Denied(400, "invalid_request", "more than one Authorization header")
    token = bearer_token(headers[0]) if headers else None
    if token is None:
        # No error code for a request without credentials (RFC 6750, section 3.1).
        raise Denied(401, "", "a bearer token is needed")
    return token


@contextmanager
def _denials() -> Iterator[None]:
    try:
        yield
    except TokenRefused as refused:
        raise _denied(refused) from None
    except Unavailable:
        raise Denied(503, "temporarily_unavailable", "tokens cannot be verified now") from None


def _denied(refused: TokenRefused) -> Denied:
    # Without characters that a quoted header parameter may not hold.
    detail = re.sub(r"[^ !#-\[\]-~]", "", refused.detail)
    if refused.reason == "scope_missing":
        return Denied(403, "insufficient_scope", "the token lacks a scope", detail)
    if refused.detail == "other_org":
        return Denied(403, "insufficient_scope", "the token is for another org")
    if refused.detail == "other_client":
        return Denied(403, "insufficient_scope", "the token was issued to another client")
    return Denied(401, "invalid_token", f"the token is invalid: {detail}")
