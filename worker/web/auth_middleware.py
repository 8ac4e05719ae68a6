"""Auth middleware: every request has a caller by bearer token or session, or is refused; health is exempt."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.clock import Clock
from worker.errors import AccessDenied, TokenError
from worker.web.access import Access, Caller
from worker.web.api import BASE
from worker.web.forms import SESSION, Forms
from worker.web.health import PATHS


class AuthMiddleware:
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


LOGIN = "/login"
LASTS = timedelta(hours=12)
# Of one caller; the one that is a session more ends its oldest.
MOST = 50
# Seconds between two looks for sessions that are over.
_SWEEP = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who showed a good token; each form of theirs has to carry `csrf`."""

    key: str
    csrf: str
    caller: Caller
    until: datetime


class Sessions:
    """In memory, and so many of each caller at most; a restart ends them all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[str, Session] = {}
        # By the caller's key, oldest first.
        self._of: dict[str, list[Session]] = {}
        self._sweep_at = 0.0

    def begin(self, caller: Caller) -> Session:
        """A session of this caller, which ends with the token it was begun by, or after 12 hours."""
        now = self._clock.now()
        self._sweep(now)
        until = min(now + LASTS, caller.until or now + LASTS)
        session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), caller, until)
        mine = self._of.setdefault(caller.key, [])
        while len(mine) >= MOST:
            del self._open[mine.pop(0).key]
        mine.append(session)
        self._open[session.key] = session
        return session

    def find(self, key: str | None) -> Session | None:
        """The session of this cookie, if it is not over."""
        session = self._open.get(key or "")
        return session if session is not None and session.until > self._clock.now() else None

    def end(self, session: Session) -> None:
        if self._open.pop(session.key, None) is None:
            return
        mine = self._of[session.caller.key]
        mine.remove(session)
        if not mine:
            del self._of[session.caller.key]

    def _sweep(self, now: datetime) -> None:
        if self._clock.monotonic() >= self._sweep_at:
            self._sweep_at = self._clock.monotonic() + _SWEEP
            for session in [session for session in self._open.values() if session.until <= now]:
                self.end(session)
