"""Verifies tokens in a customer's own backend, also as ASGI middleware.

It needs no database and no worker: `Guard("https://acme.kinde.com", audience="https://api.acme.com")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import httpx

from .claims import Claims
from .clock import Clock, SystemClock
from .decode import decode, enforce, invalid
from .errors import ConfigurationError, TokenRefused, Unavailable
from .http import open_client
from .issuer import Endpoints, Issuer
from .jwks import KeyNotPublished, KeySet
from .profile import load
from .report import Report, log
from .verify import verify

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)


def bearer_token(header: str) -> str | None:
    """The token of an Authorization header (RFC 6750, section 2.1); None if it has none."""
    match = _BEARER.fullmatch(header.strip())
    return match[1] if match else None


class Guard:
    """Verifies the tokens of one issuer for one audience.

    `profile` names a provider, or is the path of your own TOML file. `scopes` are
    required of every token. `{org}` in the audience is the code of the org that a
    request addresses. The keys are fetched at the first token and cached; pass `client`
    to share an HTTP client. `report` gets the events, by default the log. Raises
    ConfigurationError for an invalid URL or profile.
    """

    def __init__(
        self,
        issuer: str | Issuer,
        *,
        audience: str = "",
        profile: str = "kinde",
        scopes: Iterable[str] = (),
        client: httpx.AsyncClient | None = None,
        clock: Clock | None = None,
        report: Report = log,
    ) -> None:
        if isinstance(issuer, str):
            issuer = Issuer(name=issuer, profile=load(profile), url=issuer, audience=audience or None)
        if not (audience or issuer.audience):
            raise ConfigurationError(
                "a guard needs an audience: without one it would accept any API's token",
                fix="name your API's audience as registered at the provider",
            )
        self._issuer = issuer
        self._audience = audience or issuer.audience or ""
        self._scopes = frozenset(scopes)
        self._clock = clock or SystemClock()
        self._owns_client = client is None
        self._client = client or open_client()
        self._endpoints = Endpoints(issuer, self._client, clock=self._clock, report=report)
        self._keys = KeySet(issuer, self._endpoints, clock=self._clock, report=report)

    async def check(
        self, token_text: str, *, org_code: str | None = None, scopes: Iterable[str] = ()
    ) -> Claims:
        """The claims of a valid token, of this org and with these scopes if given.

        Raises:
            TokenRefused: token_invalid; or org_mismatch, scope_missing: a valid token without permission.
            IssuerUnavailable: the issuer's keys cannot be read, so there is no verdict.
        """
        try:
            payload = await verify(
                token_text,
                issuer=self._issuer,
                audience=self._audience.replace("{org}", org_code or ""),
                keys=self._keys,
                clock=self._clock,
            )
        except KeyNotPublished:
            # A caller can retry later, and anyone can make up a kid.
            raise invalid("unknown_kid", "it is signed with a key that the issuer does not publish") from None
        claims = decode(payload, self._issuer.profile)
        enforce(
            claims,
            org_code=claims.org_code if org_code is None else org_code,
            client_id=None,
            scopes=self._scopes.union(scopes),
        )
        return claims

    async def close(self) -> None:
        """Cancel reads of keys, and close the HTTP client if the guard opened it."""
        await self._keys.close()
        await self._endpoints.close()
        if self._owns_client:
            await self._client.aclose()


async def check(token_text: str, guard: Guard) -> Claims:
    """The claims of a valid token; raises as `Guard.check` does."""
    return await guard.check(token_text)


class RequireToken:
    """ASGI middleware: a request with a valid bearer token gets its `Claims` in `scope["claims"]`.

    Other requests get 401 (missing or invalid token), 403 (valid, without permission) or 503
    (the issuer's keys cannot be read), per RFC 6750, section 3. `org_of` returns the org that
    a request addresses, `scopes_of` the scopes it needs beyond the guard's; `open_paths` need
    no token. The claims are also in `scope["state"]["claims"]`, Starlette's
    `request.state.claims`.
    """

    def __init__(
        self,
        app: App,
        guard: Guard | None = None,
        *,
        issuer: str | Issuer = "",
        audience: str = "",
        profile: str = "kinde",
        scopes: Iterable[str] = (),
        org_of: Callable[[Scope], str | None] | None = None,
        scopes_of: Callable[[Scope], Iterable[str]] | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._guard = guard or Guard(issuer, audience=audience, profile=profile, scopes=scopes)
        self._org_of = org_of
        self._scopes_of = scopes_of
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope.get("path") in self._open_paths:
            await self._app(scope, receive, send)
            return
        try:
            claims = await self._claims(scope)
        except _Denied as denied:
            await denied.respond(scope, receive, send)
            return
        state = {**scope.get("state", {}), "claims": claims}
        await self._app({**scope, "claims": claims, "state": state}, receive, send)

    async def _claims(self, scope: Scope) -> Claims:
        headers = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        if len(headers) > 1:
            raise _Denied(400, "invalid_request", "more than one Authorization header")
        token = bearer_token(headers[0].decode("latin-1")) if headers else None
        if token is None:
            # No error code for a request without credentials (RFC 6750, section 3.1).
            raise _Denied(401, "", "a bearer token is needed")
        try:
            return await self._guard.check(
                token,
                org_code=self._org_of(scope) if self._org_of else None,
                scopes=self._scopes_of(scope) if self._scopes_of else (),
            )
        except TokenRefused as refused:
            raise _denied(refused) from None
        except Unavailable:
            raise _Denied(503, "temporarily_unavailable", "tokens cannot be verified now") from None


@dataclass(eq=False)
class _Denied(Exception):
    """The response to a request without access."""

    status: int
    error: str
    description: str
    scope: str = ""

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; a websocket is closed before it is accepted, which servers turn into a 403."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": self.error or "unauthorized"})
            return
        body = {"error": self.error or "unauthorized", "error_description": self.description}
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        if self.status == 503:
            headers.append((b"retry-after", b"5"))
        else:
            headers.append((b"www-authenticate", self._challenge().encode("latin-1")))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    def _challenge(self) -> str:
        parts = ['realm="api"']
        if self.error:
            parts += [f'error="{self.error}"', f'error_description="{self.description}"']
        if self.scope:
            parts.append(f'scope="{self.scope}"')
        return "Bearer " + ", ".join(parts)


def _denied(refused: TokenRefused) -> _Denied:
    # Without characters that a quoted header parameter may not hold.
    detail = re.sub(r"[^ !#-\[\]-~]", "", refused.detail)
    if refused.reason == "scope_missing":
        return _Denied(403, "insufficient_scope", "the token lacks a scope", detail)
    if refused.reason == "org_mismatch" and refused.detail == "other_org":
        return _Denied(403, "insufficient_scope", "the token is for another org")
    return _Denied(401, "invalid_token", f"the token is invalid: {detail}")
