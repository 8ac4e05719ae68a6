"""Forms: the dashboard's cookies, and whether a form was sent by a page of ours."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from worker.errors import AccessDenied
from worker.web.addresses import Addresses
from worker.web.responses import read_form

SESSION = "orgworker_session"
# Beside the login form, which has no session yet.
LOGIN = "orgworker_login"
# A browser takes a cookie of this prefix only from this host itself, over https.
PREFIX = "__Host-"
_NONCE = re.compile(r"[A-Za-z0-9_-]{43}")


class Forms:
    """Cookies and CSRF tokens. `public_url` is where browsers reach the dashboard; "" is unknown."""

    def __init__(self, public_url: str, addresses: Addresses) -> None:
        self._public_origin = _origin(public_url) if public_url else None
        self._addresses = addresses
        self._key = secrets.token_bytes(32)

    def cookie(self, connection: HTTPConnection, name: str) -> str | None:
        """The value of a cookie of ours."""
        return connection.cookies.get(self._named(connection, name))

    def set_cookie(self, connection: HTTPConnection, answer: Response, name: str, value: str) -> None:
        """Let the browser keep it until it is closed, out of reach of scripts and of other sites' forms."""
        answer.set_cookie(
            self._named(connection, name),
            value,
            path="/",
            httponly=True,
            samesite="lax",
            secure=self._is_https(connection),
        )

    def delete_cookie(self, connection: HTTPConnection, answer: Response, name: str) -> None:
        answer.delete_cookie(
            self._named(connection, name),
            path="/",
            httponly=True,
            samesite="lax",
            secure=self._is_https(connection),
        )

    def login_nonce(self, connection: HTTPConnection) -> str:
        """The nonce for a login form: the one that the browser has, so that two open forms both work."""
        given = self.cookie(connection, LOGIN) or ""
        return given if _NONCE.fullmatch(given) else secrets.token_urlsafe(32)

    def login_csrf(self, nonce: str) -> str:
        """The CSRF token of a login form, good with this nonce in the browser's cookie only."""
        return hmac.new(self._key, nonce.encode(), hashlib.sha256).hexdigest()

    def check_origin(self, request: Request) -> None:
        """Let through what a page of ours sent, as the browser says.

        Raises:
            AccessDenied: another page sent it, or no browser says which.
        """
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site not in (None, "same-origin") or (origin is None and site is None):
            raise _elsewhere()
        if origin is None:
            return
        if self._public_origin is not None:
            ours = origin == self._public_origin
        else:
            # Which scheme a proxy before us speaks is not known.
            ours = urlsplit(origin).netloc == request.headers.get("host", "")
        if not ours:
            raise _elsewhere()

    async def read(self, request: Request, csrf: str) -> dict[str, str]:
        """The fields of a form that a page of ours sent; the only way to read one.

        Raises:
            AccessDenied: another page sent it, or it lacks this CSRF token.
            UsageError: it is no form.
        """
        self.check_origin(request)
        form = await read_form(request)
        if not hmac.compare_digest(form.get("csrf", "").encode(), csrf.encode()):
            raise _elsewhere()
        return form

    async def read_login(self, request: Request) -> dict[str, str]:
        """As `read`, of the login form."""
        nonce = self.cookie(request, LOGIN)
        # Without a cookie no token fits.
        return await self.read(request, self.login_csrf(nonce or secrets.token_urlsafe(32)))

    def _named(self, connection: HTTPConnection, name: str) -> str:
        return f"{PREFIX}{name}" if self._is_https(connection) else name

    def _is_https(self, connection: HTTPConnection) -> bool:
        if self._public_origin is not None:
            return self._public_origin.startswith("https:")
        return self._addresses.is_https(connection)


def _origin(url: str) -> str:
    """Scheme, host and port as browsers write them: in lower case, without the scheme's own port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, {"https": 443, "http": 80}[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _elsewhere() -> AccessDenied:
    return AccessDenied(
        "this form was not sent by a page that you opened here",
        fix="open the page again and send the form from there; web.public_url in worker.toml must be the "
        "address that your browser shows",
    )
