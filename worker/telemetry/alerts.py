"""Alerts: one for each cause of trouble, however often it strikes, and one more when it is over."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from worker.clock import Clock, to_text
from worker.telemetry.events import Emitted

Kind = Literal["failed", "refused", "overdue", "paused", "credential_dead"]
Status = Literal["firing", "resolved"]
Cause = tuple[str | None, ...]
# What a cause has struck; once each has done well again, the cause is over.
Struck = tuple[str | None, ...]

# A cause that strikes no more counts as over after this; longer than the period of a daily job.
QUIET = timedelta(hours=25)
# Open at once; beyond that there is one trouble, and it is told already.
MOST_OPEN = 1000


@dataclass(frozen=True, slots=True)
class Alert:
    """One message: a cause that strikes, told at its first time, or one that is over."""

    id: str
    cause: str
    kind: Kind
    status: Status
    summary: str
    at: datetime
    since: datetime
    count: int
    affected: int
    fields: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The body of the webhook; `cause` is the same on every worker and at every time."""
        return {
            "id": self.id,
            "cause": self.cause,
            "kind": self.kind,
            "status": self.status,
            "summary": self.summary,
            "at": to_text(self.at),
            "since": to_text(self.since),
            "count": self.count,
            "affected": self.affected,
            **self.fields,
        }


@dataclass(slots=True)
class _Open:
    first: Alert
    last_at: datetime
    count: int = 0
    struck: set[Struck] = field(default_factory=set)
    affected: set[Struck] = field(default_factory=set)


class Alerts:
    """Listens to the events and calls `send`, from the thread of the event, for each beginning and end.

    What is open is kept in this process only: several workers tell each of what they
    carried, under the same `cause`, and a restart forgets.
    """

    def __init__(self, clock: Clock, send: Callable[[Alert], None]) -> None:
        self._clock = clock
        self._send = send
        self._lock = threading.Lock()
        self._open: dict[Cause, _Open] = {}

    def take(self, emitted: Emitted) -> None:
        """Take note of one event."""
        for alert in self._of(emitted.event.name, emitted.fields):
            self._send(alert)

    def tidy(self) -> None:
        """End what has not struck for long; called every now and then."""
        now = self._clock.now()
        with self._lock:
            old = [cause for cause, one in self._open.items() if now - one.last_at > QUIET]
            ended = [self._end(cause, "it has not struck again") for cause in old]
        for alert in ended:
            self._send(alert)

    def _of(self, event: str, fields: Mapping[str, Any]) -> list[Alert]:
        org, definition, handler = (fields.get(name) for name in ("org", "definition", "handler"))
        reason, detail = fields.get("reason"), fields.get("detail")
        match event, fields.get("state"):
            case "run.ended", "failed":
                why = fields.get("error_cause") or reason
                summary = f"{handler} fails: {reason}" + (f" ({why})" if why != reason else "")
                return self._strike("failed", (handler, why), (org, definition), summary, fields)
            case "run.ended", "refused":
                summary = f"{handler} is refused: {reason} ({detail})"
                return self._strike("refused", (handler, reason, detail), (org, definition), summary, fields)
            case "run.ended", "succeeded":
                return self._well((org, definition), "succeeded", ("failed", "refused", "paused"))
            case "run.recovered", "failed":
                summary = "runs fail since their workers died too often"
                return self._strike("failed", (None, "lost"), (fields.get("run"),), summary, fields)
            case "definition.paused", _:
                summary = f"{definition} of {org} is paused after {fields.get('failures')} failures"
                return self._strike("paused", (org, definition), (org, definition), summary, fields)
            case (("org.parked" | "credential.unusable"), _):
                summary = f"{org} gets no token: {fields.get('error')}"
                return self._strike("credential_dead", (org,), (org,), summary, fields)
            case "token.requested", _:
                return self._well((org,), "got a token", ("credential_dead",))
            case "schedule.overdue", _:
                summary = (
                    f"nothing is fired: {definition} of {org} has been due for {fields.get('seconds')} s"
                )
                return self._strike("overdue", (), (), summary, fields)
            case "schedule.caught_up", _:
                return self._well((), "was fired", ("overdue",))
        return []

    def _strike(
        self, kind: Kind, what: Cause, struck: Struck, summary: str, fields: Mapping[str, Any]
    ) -> list[Alert]:
        cause, now = (kind, *what), self._clock.now()
        with self._lock:
            known = self._open.get(cause)
            told: list[Alert] = []
            if known is None:
                if len(self._open) >= MOST_OPEN:
                    return []
                key = hashlib.sha256(repr(cause).encode()).hexdigest()[:32]
                shown = {name: value for name, value in fields.items() if value is not None}
                first = Alert(
                    f"{key}-{int(now.timestamp())}", key, kind, "firing", summary, now, now, 1, 1, shown
                )
                known = self._open[cause] = _Open(first, now)
                told = [first]
            known.count += 1
            known.last_at = now
            known.struck.add(struck)
            known.affected.add(struck)
        return told

    def _well(self, struck: Struck, how: str, kinds: tuple[Kind, ...]) -> list[Alert]:
        with self._lock:
            if not self._open:
                return []
            over = []
            for cause, one in self._open.items():
                if cause[0] in kinds and struck in one.struck:
                    one.struck.discard(struck)
                    if not one.struck:
                        over.append(cause)
            return [self._end(cause, f"each that it struck {how} again") for cause in over]

    def _end(self, cause: Cause, how: str) -> Alert:
        one = self._open.pop(cause)
        return replace(
            one.first,
            status="resolved",
            summary=f"over, {how}: {one.first.summary}",
            at=self._clock.now(),
            count=one.count,
            affected=len(one.affected),
        )
