"""FastAPI: a dependency that gives the claims of a request's token."""

# Without `annotations` from the future: FastAPI reads those of the dependency.
from collections.abc import Awaitable, Callable, Iterable

from fastapi import HTTPException, WebSocketException
from fastapi.requests import HTTPConnection

from .access import Denied, Rules, guard_of
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
) -> Callable[[HTTPConnection], Awaitable[Claims]]:
    """A dependency with the token's `Claims`: `Annotated[Claims, Depends(require_token(guard))]`.

    `org_of` and `client_of` get the request, which has the parameters of the path in `path_params`.
    Statuses and headers of a request without access are those of the ASGI `RequireToken`; its body is
    in `detail` of an `HTTPException`. A websocket is closed with code 1008.
    """
    rules: Rules[HTTPConnection] = Rules(
        guard_of(guard, issuer, audience, profile), scopes=scopes, org_of=org_of, client_of=client_of
    )

    async def claims_of_token(request: HTTPConnection) -> Claims:
        try:
            return await rules.claims_threadsafe(request, request.headers.getlist("authorization"))
        except Denied as denied:
            if request.scope["type"] == "websocket":
                raise WebSocketException(1008, denied.error or "unauthorized") from None
            headers = {name: value for name, value in denied.headers.items() if name != "Content-Type"}
            raise HTTPException(denied.status, denied.content, headers) from None

    return claims_of_token
