"""Sessions of the dashboard: a token shown once opens one, kept in this process only."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.clock import Clock
from worker.web.access import Caller

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
