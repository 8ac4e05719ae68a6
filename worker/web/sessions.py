"""Sessions: authentication of every request, the dashboard's cookies, and CSRF protection of its forms."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.clock import Clock
from worker.errors import AccessDenied, TokenError
from worker.web.access import Access, Caller
from worker.web.api import BASE
from worker.web.clients import Addresses
from worker.web.health import PATHS
from worker.web.responses import read_form

LOGIN = "/login"
# Style and script, which the login page needs too.
STATIC = "/static/"
LASTS = timedelta(hours=12)
# Sessions of one caller; another one ends its oldest.
MOST = 50
# Seconds between two removals of expired sessions.
_SWEEP = 60.0


class AuthMiddleware:
    """ASGI middleware: authenticates every request except for health, static files and the login form.

    Puts the `Caller` into `scope["caller"]`, and for the dashboard the session into
    `scope["session"]`. The API ignores session cookies: another site's page can make a
    browser send them.
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
        elif path not in PATHS and not path.startswith(STATIC):
            scope["caller"] = await self._caller(connection)
        await self._app(scope, receive, send)

    async def _caller(self, connection: HTTPConnection) -> Caller:
        caller = await self._access.caller_of(connection)
        if caller is not None:
            return caller
        if not in_api(connection.scope):
            session = self._sessions.find(self._forms.cookie(connection, SESSION_COOKIE))
            if session is not None:
                try:
                    caller = await self._access.confirm(session.caller)
                except (AccessDenied, TokenError):
                    self._sessions.end(session)
                    raise
                connection.scope["session"] = session
                return caller
        self._access.count_stranger(connection)
        raise TokenError("a bearer token is required", fix="send the header Authorization: Bearer TOKEN")


def in_api(scope: Scope) -> bool:
    """Whether the path is for programs, not for people."""
    path: str = scope["path"]
    return path in PATHS or path == "/api" or path.startswith(f"{BASE.rpartition('/')[0]}/")


@dataclass(frozen=True, slots=True)
class Session:
    """A caller who logged in; `key` is the value of its cookie."""

    key: str
    caller: Caller
    until: datetime


class Sessions:
    """Sessions in memory, a limited number for each caller; a restart ends them all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[str, Session] = {}
        # By the caller's key, oldest first.
        self._of: dict[str, list[Session]] = {}
        self._sweep_at = 0.0

    def begin(self, caller: Caller) -> Session:
        """Open a session, which ends when the caller's token expires, or after 12 hours."""
        now = self._clock.now()
        self._sweep(now)
        until = min(now + LASTS, caller.until or now + LASTS)
        session = Session(secrets.token_urlsafe(32), caller, until)
        mine = self._of.setdefault(caller.key, [])
        while len(mine) >= MOST:
            del self._open[mine.pop(0).key]
        mine.append(session)
        self._open[session.key] = session
        return session

    def find(self, key: str | None) -> Session | None:
        """The open session with this key."""
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


SESSION_COOKIE = "orgworker_session"
# Holds the nonce of the login form, which has no session yet.
LOGIN_COOKIE = "orgworker_login"
# A browser accepts a cookie with this prefix only from this host itself, over https.
PREFIX = "__Host-"
_NONCE = re.compile(r"[A-Za-z0-9_-]{43}")


class Forms:
    """Cookies, and CSRF tokens bound to them. `public_url` is the dashboard's address; "" if unknown."""

    def __init__(self, public_url: str, addresses: Addresses) -> None:
        self._public_origin = _origin(public_url) if public_url else None
        self._addresses = addresses
        self._key = secrets.token_bytes(32)

    def cookie(self, connection: HTTPConnection, name: str) -> str | None:
        """The value of one of the dashboard's cookies."""
        return connection.cookies.get(self._named(connection, name))

    def set_cookie(
        self, connection: HTTPConnection, response: Response, name: str, value: str | None
    ) -> None:
        """Set a cookie until the browser closes, hidden from scripts and other sites; None deletes it."""
        gone = 0 if value is None else None
        response.set_cookie(
            self._named(connection, name),
            value or "",
            max_age=gone,
            expires=gone,
            path="/",
            httponly=True,
            samesite="lax",
            secure=self._is_https(connection),
        )

    def login_nonce(self, connection: HTTPConnection) -> str:
        """The nonce for a login form: the browser's own if it has one, so that two open forms both work."""
        given = self.cookie(connection, LOGIN_COOKIE) or ""
        return given if _NONCE.fullmatch(given) else secrets.token_urlsafe(32)

    def csrf(self, value: str) -> str:
        """The CSRF token of forms in a browser whose cookie has this value."""
        return hmac.new(self._key, value.encode(), hashlib.sha256).hexdigest()

    def check_origin(self, request: Request) -> None:
        """Check that one of our own pages sent the request, according to the browser.

        Raises:
            AccessDenied: another page sent it, or no browser names its origin.
        """
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site not in (None, "same-origin") or (origin is None and site is None):
            raise _foreign()
        if origin is None:
            return
        if self._public_origin is not None:
            ours = origin == self._public_origin
        else:
            # The scheme that a proxy before this server uses is unknown.
            ours = urlsplit(origin).netloc == request.headers.get("host", "")
        if not ours:
            raise _foreign()

    async def read(self, request: Request, cookie: str) -> dict[str, str]:
        """The fields of a form whose CSRF token fits the browser's cookie; the only way to read one.

        Raises:
            AccessDenied: another page sent it, or its CSRF token does not fit.
            UsageError: it is not a form.
        """
        self.check_origin(request)
        form = await read_form(request)
        # Without a cookie no token fits.
        expected = self.csrf(self.cookie(request, cookie) or secrets.token_urlsafe(32))
        if not hmac.compare_digest(form.get("csrf", "").encode(), expected.encode()):
            raise _foreign()
        return form

    def _named(self, connection: HTTPConnection, name: str) -> str:
        return f"{PREFIX}{name}" if self._is_https(connection) else name

    def _is_https(self, connection: HTTPConnection) -> bool:
        if self._public_origin is not None:
            return self._public_origin.startswith("https:")
        return self._addresses.is_https(connection)


def _origin(url: str) -> str:
    """Scheme, host and port as browsers write them: in lower case, without the scheme's default port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, {"https": 443, "http": 80}[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _foreign() -> AccessDenied:
    return AccessDenied(
        "no page of this dashboard sent the form",
        fix="open the page again and send the form from there; web.public_url in worker.toml must be the "
        "address that your browser shows",
    )
