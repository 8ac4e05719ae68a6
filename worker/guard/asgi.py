"""ASGI middleware that lets only requests with a valid token through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .access import Denied, Middleware

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireToken(Middleware[App, Scope]):
    """ASGI middleware: a request with a valid bearer token gets its `Claims` in `scope["claims"]`.

    Other requests get 401 (missing or invalid token), 403 (valid, without permission) or 503
    (the issuer's keys cannot be read), per RFC 6750, section 3. `org_of` and `client_of` return
    the org and the client that a request's token must have, `scopes_of` the scopes it needs
    beyond `scopes`; `open_paths` need no token. The claims are also in `scope["state"]["claims"]`,
    Starlette's `request.state.claims`.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope.get("path") in self._open_paths:
            await self._app(scope, receive, send)
            return
        headers = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        try:
            claims = await self._rules.claims(scope, [value.decode("latin-1") for value in headers])
        except Denied as denied:
            await _respond(denied, scope, receive, send)
            return
        state = {**scope.get("state", {}), "claims": claims}
        await self._app({**scope, "claims": claims, "state": state}, receive, send)


async def _respond(denied: Denied, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the response; a websocket is closed before it is accepted, which servers turn into a 403."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": denied.error or "unauthorized"})
        return
    body = denied.body
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in denied.headers.items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": denied.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
