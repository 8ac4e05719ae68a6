"""`httpx2_client`: `ctx.http` for libraries that need httpx2, such as the clients of OpenAI and MCP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.handlers.context import Context
from worker.handlers.httpx2_transport import LEFT_OUT, TIMEOUT, Httpx2Transport

if TYPE_CHECKING:
    import httpx2


def httpx2_client(ctx: Context[Any, Any]) -> httpx2.AsyncClient:
    """An httpx2 client whose requests are sent by `ctx.http`.

    They carry the org's token, and only to `api_origins`; an `Authorization` header of the library is
    dropped, so its API key may be any text. Closing the client does not close `ctx.http`.
    """
    if not isinstance(ctx, Context):
        raise TypeError("httpx2_client needs the Context of an async handler")
    # `ctx.http` adds the org's token only to requests without that header.
    transport = Httpx2Transport(ctx.http, LEFT_OUT | {"authorization"})
    import httpx2

    return httpx2.AsyncClient(transport=transport, timeout=TIMEOUT)
