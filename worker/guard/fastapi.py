"""FastAPI: a dependency that gives the claims of a request's token."""

# Without `annotations` from the future: FastAPI reads those of the dependency.
from collections.abc import Callable, Iterable

from fastapi import HTTPException, WebSocketException
from fastapi.openapi.models import HTTPBearer
from fastapi.requests import HTTPConnection
from fastapi.security.base import SecurityBase

from .access import AccessRules, Denied, guard_of
from .claims import Claims
from .guard import Guard
from .issuer import Issuer


def require_token(
    guard: Guard | None = None,
    *,
    issuer: str | Issuer = "",
    audience: str = "",
    profile: str = "kinde",
    scopes: Iterable[str] = (),
    org_of: Callable[[HTTPConnection], str | None] | None = None,
    client_of: Callable[[HTTPConnection], str | None] | None = None,
) -> "TokenClaims":
    """A dependency with the token's `Claims`: `Annotated[Claims, Depends(require_token(guard))]`.

    `org_of` and `client_of` get the request, which has the parameters of the path in `path_params`.
    Statuses and headers of a request without access are those of the ASGI `RequireToken`; its body is
    in `detail` of an `HTTPException`. A websocket is closed with code 1008. The document of the API
    names the bearer token.
    """
    return TokenClaims(
        AccessRules(
            guard_of(guard, issuer, audience, profile), scopes=scopes, org_of=org_of, client_of=client_of
        )
    )


class TokenClaims(SecurityBase):
    """The dependency that `require_token` makes."""

    def __init__(self, rules: AccessRules[HTTPConnection]) -> None:
        self.model = HTTPBearer(bearerFormat="JWT", description="The access token of an org's client.")
        self.scheme_name = "orgToken"
        self._rules = rules

    async def __call__(self, request: HTTPConnection) -> Claims:
        try:
            return await self._rules.claims_threadsafe(request, request.headers.getlist("authorization"))
        except Denied as denied:
            if request.scope["type"] == "websocket":
                raise WebSocketException(1008, denied.error or "unauthorized") from None
            headers = {name: value for name, value in denied.headers.items() if name != "Content-Type"}
            raise HTTPException(denied.status, denied.content, headers) from None
