"""Sessions of the dashboard: a token shown once opens one, kept in this process only."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.clock import Clock
from worker.errors import AccessDenied
from worker.web.access import Caller

COOKIE = "orgworker_session"
LOGIN = "/login"
LASTS = timedelta(hours=12)
MOST = 1000


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who showed a good token; each form of theirs has to carry `csrf`."""

    key: str
    csrf: str
    caller: Caller
    until: datetime

    def check(self, csrf: str, origin: str | None, host: str) -> None:
        """Let through what a page of ours sent.

        Raises:
            AccessDenied: it came from elsewhere.
        """
        elsewhere = origin is not None and origin.partition("://")[2] != host
        if elsewhere or not hmac.compare_digest(csrf.encode(), self.csrf.encode()):
            raise AccessDenied("this form is not of a page that you opened here", fix="open the page anew")


class Sessions:
    """In memory and bounded; a restart ends them all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[str, Session] = {}

    def begin(self, caller: Caller) -> Session:
        """A session of this caller, which ends with the token it was begun by, or after 12 hours."""
        now = self._clock.now()
        self._open = {key: one for key, one in self._open.items() if one.until > now}
        if len(self._open) >= MOST:
            del self._open[next(iter(self._open))]
        until = min(now + LASTS, caller.until or now + LASTS)
        session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), caller, until)
        self._open[session.key] = session
        return session

    def find(self, key: str | None) -> Session | None:
        """The session of this cookie, if it is not over."""
        session = self._open.get(key or "")
        return session if session is not None and session.until > self._clock.now() else None

    def end(self, session: Session) -> None:
        self._open.pop(session.key, None)
