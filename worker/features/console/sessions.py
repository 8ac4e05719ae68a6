"""Sessions: authentication of every request, the console's cookies, and CSRF protection of its forms."""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.clock import Clock
from worker.errors import AccessDenied, NotFound, TokenError
from worker.features.console.access import Access
from worker.features.console.api import BASE
from worker.features.console.callers import Caller
from worker.features.console.login import Transactions
from worker.features.console.mcp import PATH as MCP
from worker.kit.web.clients import Addresses
from worker.kit.web.health import PATHS
from worker.kit.web.responses import read_form
from worker.store import roles, sign_in
from worker.store.database import Database

LOGIN = "/login"
# Style and script, which the login page needs too.
STATIC = "/static/"
# The documentation, which tells a stranger how to log in.
DOCS = "/docs/"
LASTS = timedelta(hours=12)
# Sessions of one caller; another one ends its oldest.
MAX_SESSIONS = 50


class AuthMiddleware:
    """ASGI middleware: authenticates every request except for health, static files, documentation and logins.

    Puts the `Caller` into `scope["caller"]`, and for the console the session into
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
        if path == LOGIN or path.startswith(f"{LOGIN}/"):
            self._access.count_stranger(connection)
        elif path not in PATHS and not path.startswith((STATIC, DOCS)):
            scope["caller"] = await self._caller(connection)
            # An event stream asks again whether its caller still has access.
            scope["authenticate"] = functools.partial(self._caller, connection)
            if "\0" in path:
                raise NotFound("no name has a NUL character", fix="leave %00 out of the address")
        await self._app(scope, receive, send)

    async def _caller(self, connection: HTTPConnection) -> Caller:
        caller = await self._access.caller_of(connection)
        if caller is not None:
            return caller
        if not in_api(connection.scope):
            session = await self._sessions.find(self._forms.cookie(connection, SESSION_COOKIE))
            if session is not None:
                try:
                    caller = await self._access.confirm_session(session.caller)
                except (AccessDenied, TokenError):
                    await self._sessions.end(session)
                    raise
                connection.scope["session"] = session
                return caller
        self._access.count_stranger(connection)
        raise TokenError("a bearer token is required", fix="send the header Authorization: Bearer TOKEN")


def in_api(scope: Scope) -> bool:
    """Whether the path is for programs, not for people."""
    path: str = scope["path"]
    return path in (*PATHS, MCP, "/api") or path.startswith(f"{BASE.rpartition('/')[0]}/")


@dataclass(frozen=True, slots=True)
class Session:
    """A caller who logged in; `key` is the value of its cookie."""

    key: str = field(repr=False)
    caller: Caller
    until: datetime


class Sessions:
    """Sessions as rows, which all processes share; a limited number for each caller.

    A row has only the hash of its key. Each request reads its session, so one that has ended is
    over at once everywhere. `begun` are the logins that have begun.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self.begun = Transactions(database, clock)

    async def begin(self, caller: Caller) -> Session:
        """Open a session, which ends when the caller's token expires, or after 12 hours."""
        now = self._clock.now()
        until = min(now + LASTS, caller.until or now + LASTS)
        session = Session(secrets.token_urlsafe(32), caller, until)
        row = {name: getattr(caller, name) for name in _STORED}
        row |= {"key_sha256": sign_in.sha256(session.key), "caller": caller.key}
        row |= {"created_at": now, "until": until}
        await self._acting().call(sign_in.begin_session, row, most=MAX_SESSIONS)
        return session

    async def find(self, key: str | None) -> Session | None:
        """The open session with this key."""
        if not key:
            return None
        row = await self._acting().call_autocommit(
            sign_in.find_session, sign_in.sha256(key), at=self._clock.now()
        )
        if row is None:
            return None
        return Session(key, Caller(**{name: row[name] for name in _STORED}), row["until"])

    async def end(self, session: Session) -> None:
        """End a session; it may have ended already."""
        await self._acting().call(sign_in.end_session, sign_in.sha256(session.key))

    def _acting(self) -> Database:
        """In the operators' role: the caller is not known yet, and an org's role may not see these rows."""
        return self._database.acting(roles.ALL_ORGS)


# What a session keeps of its caller; the rest is read again at each request.
_STORED = (
    *("kind", "name", "role", "org", "subject", "home"),
    *("issuer", "client_id", "has_org_scope", "basis"),
)
SESSION_COOKIE = "orgworker_session"
# Holds the nonce of the login form, which has no session yet.
LOGIN_COOKIE = "orgworker_login"
# A browser accepts a cookie with this prefix only from this host itself, over https.
PREFIX = "__Host-"
# Characters of the salt that a CSRF token begins with.
_SALT = 16
_NONCE = re.compile(r"[A-Za-z0-9_-]{43}")


class Forms:
    """Cookies, and CSRF tokens bound to them. `public_url` is the console's address; "" if unknown."""

    def __init__(self, public_url: str, addresses: Addresses) -> None:
        self.public_origin = _origin(public_url) if public_url else None
        self._addresses = addresses

    def cookie(self, connection: HTTPConnection, name: str) -> str | None:
        """The value of one of the console's cookies."""
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
        """A CSRF token for forms in a browser whose cookie has this value; every process accepts it.

        It does not reveal the cookie, and only the page of the browser with the cookie has it. Each call
        makes a new one: the length of compressed pages would reveal one that stays (BREACH).
        """
        return _csrf(value, secrets.token_hex(_SALT // 2))

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
        if self.public_origin is not None:
            ours = origin == self.public_origin
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
        given = form.get("csrf", "")
        # Without a cookie no token fits.
        expected = _csrf(self.cookie(request, cookie) or secrets.token_urlsafe(32), given[:_SALT])
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise _foreign()
        return form

    def _named(self, connection: HTTPConnection, name: str) -> str:
        return f"{PREFIX}{name}" if self._is_https(connection) else name

    def _is_https(self, connection: HTTPConnection) -> bool:
        if self.public_origin is not None:
            return self.public_origin.startswith("https:")
        return self._addresses.is_https(connection)


def _csrf(value: str, salt: str) -> str:
    return salt + hmac.new(value.encode(), f"orgworker csrf {salt}".encode(), hashlib.sha256).hexdigest()


def _origin(url: str) -> str:
    """Scheme, host and port as browsers write them: in lower case, without the scheme's default port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, {"https": 443, "http": 80}[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _foreign() -> AccessDenied:
    return AccessDenied(
        "no page of this console sent the form",
        fix="open the page again and send the form from there; web.public_url in worker.toml must be the "
        "address that your browser shows",
    )
