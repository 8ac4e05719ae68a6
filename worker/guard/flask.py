"""Flask: a decorator for views that need a valid token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from flask import Request, Response, current_app, g, request

from .access import AccessRules, Denied, guard_of, parted
from .guard import Guard
from .issuer import Issuer

View = Callable[..., Any]


def require_token(
    guard: Guard | None = None,
    *,
    issuer: str | Issuer = "",
    audience: str = "",
    profile: str = "kinde",
    scopes: Iterable[str] = (),
    org_of: Callable[[Request], str | None] | None = None,
    client_of: Callable[[Request], str | None] | None = None,
) -> Callable[[View], View]:
    """A decorator: the view is called with the token's `Claims` in `flask.g.claims`, or not at all.

    Put it below `@app.route`. `org_of` and `client_of` get the request, which has the parameters of
    the route in `view_args`. Responses without access are those of the ASGI `RequireToken`.
    """
    rules: AccessRules[Request] = AccessRules(
        guard_of(guard, issuer, audience, profile), scopes=scopes, org_of=org_of, client_of=client_of
    )

    def decorate(view: View) -> View:
        @wraps(view)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                g.claims = rules.claims_sync(request, parted(request.environ.get("HTTP_AUTHORIZATION")))
            except Denied as denied:
                return Response(denied.body, denied.status, denied.headers)
            return current_app.ensure_sync(view)(*args, **kwargs)

        return guarded

    return decorate
