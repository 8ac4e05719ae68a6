"""The gate: nobody passes it without a token, but those who ask for health and metrics."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.errors import AccessDenied, TokenError
from worker.web.access import Access, Caller
from worker.web.api import BASE
from worker.web.forms import SESSION, Forms
from worker.web.health import PATHS
from worker.web.sessions import LOGIN, Session, Sessions


class Gate:
    """ASGI middleware: puts the `Caller` in `scope["caller"]`, and for the dashboard the session beside it.

    A session's cookie opens the dashboard only: a page elsewhere that makes a browser
    send it gets nothing out of the API.
    """

    def __init__(self, app: ASGIApp, access: Access, sessions: Sessions, forms: Forms) -> None:
        self._app = app
        self._access = access
        self._sessions = sessions
        self._forms = forms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, connection = scope["path"], HTTPConnection(scope)
        if path == LOGIN and scope["method"] == "POST":
            self._access.count_stranger(connection)
        elif path not in PATHS:
            scope["caller"] = await self._caller(connection)
        await self._app(scope, receive, send)

    async def _caller(self, connection: HTTPConnection) -> Caller:
        caller = await self._access.caller_of(connection)
        if caller is not None:
            return caller
        if not in_api(connection.scope):
            session = self._sessions.find(self._forms.cookie(connection, SESSION))
            if session is not None:
                caller = await self._confirmed(session)
                connection.scope["session"] = session
                return caller
        self._access.count_stranger(connection)
        raise TokenError("a bearer token is needed", fix="send the header Authorization: Bearer TOKEN")

    async def _confirmed(self, session: Session) -> Caller:
        """The session's caller, if its org and credential are still good; else the session ends."""
        try:
            return await self._access.confirm(session.caller)
        except (AccessDenied, TokenError):
            self._sessions.end(session)
            raise


def in_api(scope: Scope) -> bool:
    """Whether a program asks, not a person."""
    path: str = scope["path"]
    return path in PATHS or path == "/api" or path.startswith(f"{BASE.rpartition('/')[0]}/")
