"""Alerts: from events to causes, and their delivery as signed webhooks if one is configured."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import httpx

from worker.clock import Clock, to_text
from worker.telemetry.events import Emitted
from worker.telemetry.masking import masker

Kind = Literal["failed", "refused", "overdue", "paused", "credential_dead"]
Status = Literal["firing", "resolved"]

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
class Strike:
    """A cause that struck `count` times, first by the event that has these `fields`.

    `runs` are the newest by whom it struck; `definitions` (org, name) and `orgs` are
    whom it struck where no run did.
    """

    cause: str
    kind: Kind
    summary: str
    fields: Mapping[str, Any]
    at: datetime
    count: int = 1
    runs: dict[tuple[str | None, ...], str] = field(default_factory=dict)
    definitions: set[tuple[str, str]] = field(default_factory=set)
    orgs: set[str] = field(default_factory=set)

    def join(self, later: Strike) -> None:
        """Take in what the same cause did after."""
        self.at = max(self.at, later.at)
        self.count += later.count
        self.runs |= later.runs
        self.definitions |= later.definitions
        self.orgs |= later.orgs


class Strikes:
    """Listens to the events and gathers what strikes until it is taken; calls `on_strike` at each.

    Where nobody takes it, as long as the database is away, a bounded number is kept.
    """

    def __init__(self, clock: Clock, on_strike: Callable[[], None]) -> None:
        self._clock = clock
        self._on_strike = on_strike
        self._lock = threading.Lock()
        self._gathered: dict[str, Strike] = {}

    def hear(self, emitted: Emitted) -> None:
        """Take note of one event."""
        wanted = _STATES.get(emitted.event.name)
        if wanted is None or emitted.fields.get("state") not in wanted:
            return
        self._add([self._of(emitted.event.name, emitted.fields)])
        self._on_strike()

    def take(self) -> list[Strike]:
        """What has struck since the last call, one for each cause."""
        with self._lock:
            gathered, self._gathered = self._gathered, {}
        return list(gathered.values())

    def put_back(self, strikes: Sequence[Strike]) -> None:
        """What could not be written down."""
        with self._lock:
            newer, self._gathered = self._gathered, {}
        self._add([*strikes, *newer.values()])

    def _add(self, strikes: Sequence[Strike]) -> None:
        with self._lock:
            for strike in strikes:
                known = self._gathered.get(strike.cause)
                if known is not None:
                    known.join(strike)
                elif len(self._gathered) < MOST_OPEN:
                    self._gathered[strike.cause] = strike

    def _of(self, event: str, fields: Mapping[str, Any]) -> Strike:
        org, definition, handler = (fields.get(name) for name in ("org", "definition", "handler"))
        reason, detail = fields.get("reason"), fields.get("detail")
        match event, fields.get("state"):
            case "run.ended", "refused":
                summary = f"{handler} is refused: {reason} ({detail})"
                strike = self._strike("refused", (handler, reason, detail), summary, fields)
            case "run.ended", _:
                why = fields.get("error_cause") or reason
                summary = f"{handler} fails: {reason}" + (f" ({why})" if why != reason else "")
                strike = self._strike("failed", (handler, why), summary, fields)
            case "run.recovered", _:
                summary = "runs fail since their workers died too often"
                strike = self._strike("failed", (None, "lost"), summary, fields)
            case "definition.paused", _:
                summary = f"{definition} of {org} is paused after {fields.get('failures')} failures"
                strike = self._strike("paused", (org, definition), summary, fields)
                strike.definitions.add((str(org), str(definition)))
            case "schedule.overdue", _:
                seconds = fields.get("seconds")
                summary = f"nothing is fired: {definition} of {org} has been due for {seconds} s"
                strike = self._strike("overdue", (), summary, fields)
            case _:
                summary = f"{org} gets no token: {fields.get('error')}"
                strike = self._strike("credential_dead", (org,), summary, fields)
                strike.orgs.add(str(org))
        if "run" in fields:
            struck = (org, definition) if definition else (fields["run"],)
            strike.runs[struck] = fields["run"]
        return strike

    def _strike(
        self, kind: Kind, what: tuple[str | None, ...], summary: str, fields: Mapping[str, Any]
    ) -> Strike:
        cause = hashlib.sha256(repr((kind, *what)).encode()).hexdigest()[:32]
        shown = {name: value for name, value in fields.items() if value is not None}
        return Strike(cause, kind, summary, shown, self._clock.now())


# The events that strike, and in which states; looked up at every event, so a look is all it costs.
_STATES: Mapping[str, frozenset[str | None]] = {
    "run.ended": frozenset({"failed", "refused"}),
    "run.recovered": frozenset({"failed"}),
    "definition.paused": frozenset({None}),
    "org.parked": frozenset({None}),
    "credential.unusable": frozenset({None}),
    "schedule.overdue": frozenset({None}),
}


WRITTEN = "whsec_"


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of the header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()}"


class Webhook:
    """A receiver of alerts; it knows one sent twice by its id."""

    def __init__(self, url: str, secret: str, clock: Clock, *, client: httpx.Client | None = None) -> None:
        self._url = url
        self._secret = secret
        self._clock = clock
        # No redirect is followed: the secret's signature is for this receiver.
        self._client = client or httpx.Client(timeout=10.0)
        masker.register(secret)

    def close(self) -> None:
        self._client.close()

    def post(self, alert: Alert) -> str | None:
        """Post it once; why it was not taken, or None."""
        status = alert.status
        body = masker.mask(json.dumps(alert.as_json(), default=str)).encode()
        timestamp = int(self._clock.now().timestamp())
        message_id = f"{alert.id}-{status}"
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, message_id, timestamp, body),
        }
        try:
            answer = self._client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            return type(error).__name__
        return None if answer.is_success else f"status {answer.status_code}"


def _key(secret: str) -> bytes:
    """Standard Webhooks writes a key as `whsec_` and its base64; any other text is the key itself."""
    if secret.startswith(WRITTEN):
        with contextlib.suppress(ValueError):
            return base64.b64decode(secret.removeprefix(WRITTEN), validate=True)
    return secret.encode()
