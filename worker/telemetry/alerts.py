"""Alerts: the causes that events report, and the signed webhook that delivers them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
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
from worker.ids import ALL_ORGS
from worker.telemetry.events import Emitted
from worker.telemetry.masking import masker

Kind = Literal[
    "failed",
    "refused",
    "overdue",
    "paused",
    "credential_dead",
    "provisioning_failed",
    "waiting",
    "files_opened",
    "files_changeable",
    "egress_denied",
    "late",
    "unpriced",
    "forecast",
    "rollout",
]
Status = Literal["firing", "resolved"]

# Maximum open alerts; more than these have one common cause, which has been reported by then.
MAX_OPEN = 1000
# Origins of one handler with an alert of their own: a run that tries many must not use up the open alerts.
MAX_ORIGINS = 10
OTHERS = "other origins"


@dataclass(frozen=True, slots=True)
class Alert:
    """One message: a new cause (`firing`), or one that is over (`resolved`)."""

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
        """The body of the webhook; `cause` is the same on all workers and at all times."""
        own: dict[str, Any] = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        own |= {"at": to_text(self.at), "since": to_text(self.since), **own.pop("fields")}
        return own


@dataclass(slots=True)
class Strike:
    """A cause that occurred `count` times; `fields` are those of its first event.

    `runs` has the latest affected run of each definition; `definitions` (org, name) and `orgs` are
    affected without a run.
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
        """Add later events of the same cause."""
        self.at = max(self.at, later.at)
        self.count += later.count
        self.runs |= later.runs
        self.definitions |= later.definitions
        self.orgs |= later.orgs


class Strikes:
    """Collects causes from events until `take`; calls `on_strike` at each. Keeps a bounded number."""

    def __init__(self, clock: Clock, on_strike: Callable[[], None]) -> None:
        self._clock = clock
        self._on_strike = on_strike
        self._lock = threading.Lock()
        self._gathered: dict[str, Strike] = {}
        # The origins that each handler was denied.
        self._denied: dict[str, set[str]] = {}

    def hear(self, emitted: Emitted) -> None:
        """Process one event; may be called from any thread."""
        wanted = _STATES.get(emitted.event.name)
        if wanted is None or emitted.fields.get("state") not in wanted:
            return
        if emitted.fields.get("child"):
            return  # the run that started it fails, or goes on without it
        fields = emitted.fields
        if emitted.event.name == "egress.denied":
            fields = {**fields, "origin": self._known(fields["handler"], fields["origin"])}
        self._add([self._strike(emitted.event.name, fields)])
        self._on_strike()

    def take(self) -> list[Strike]:
        """Return the strikes since the last call, one for each cause."""
        with self._lock:
            gathered, self._gathered = self._gathered, {}
        return list(gathered.values())

    def put_back(self, strikes: Sequence[Strike]) -> None:
        """Return strikes that could not be stored."""
        with self._lock:
            newer, self._gathered = self._gathered, {}
        self._add([*strikes, *newer.values()])

    def _known(self, handler: str, origin: str) -> str:
        """The origin, or `OTHERS` for one after the first that this handler was denied."""
        with self._lock:
            known = self._denied.setdefault(handler, set())
            if len(known) < MAX_ORIGINS:
                known.add(origin)
            return origin if origin in known else OTHERS

    def _add(self, strikes: Sequence[Strike]) -> None:
        with self._lock:
            for strike in strikes:
                known = self._gathered.get(strike.cause)
                if known is not None:
                    known.join(strike)
                elif len(self._gathered) < MAX_OPEN:
                    self._gathered[strike.cause] = strike

    def _strike(self, event: str, fields: Mapping[str, Any]) -> Strike:
        kind, what, summary = _cause(event, fields)
        cause = hashlib.sha256(repr((kind, *what)).encode()).hexdigest()[:32]
        shown = {name: value for name, value in fields.items() if value is not None}
        strike = Strike(cause, kind, summary, shown, self._clock.now())
        org, definition = fields.get("org"), fields.get("definition")
        if kind in ("paused", "late"):
            strike.definitions.add((str(org), str(definition)))
        elif "run" in fields:
            affected = (org, definition) if definition else (fields["run"],)
            strike.runs[affected] = fields["run"]
        elif org is not None and kind in (
            *("credential_dead", "provisioning_failed", "unpriced", "forecast"),
        ):
            strike.orgs.add(str(org))
        return strike


def _cause(event: str, fields: Mapping[str, Any]) -> tuple[Kind, tuple[str | None, ...], str]:
    """The kind of a cause, what identifies it, and its summary."""
    org, definition, handler = (fields.get(name) for name in ("org", "definition", "handler"))
    reason, detail = fields.get("reason"), fields.get("detail")
    match event, fields.get("state"):
        case "run.ended", "refused":
            return "refused", (handler, reason, detail), f"{handler} is refused: {reason} ({detail})"
        case "run.ended", _:
            why = fields.get("error_cause") or reason
            shown = fields.get("error_summary") or why
            summary = f"{handler} fails: {reason}" + (f" ({shown})" if shown != reason else "")
            return "failed", (handler, why), summary
        case "run.recovered", _:
            return "failed", (None, "lost"), "runs fail because their workers died too often"
        case "run.asks", _:
            summary = f"a run of {definition} of {org} waits for an answer: {fields.get('wait')}"
            return "waiting", (fields.get("run"), fields.get("wait")), summary
        case "definition.paused", _:
            summary = f"{definition} of {org} is paused after {fields.get('failures')} failures"
            return "paused", (org, definition), summary
        case "schedule.late", _:
            why = fields.get("why")
            summary = f"{definition} of {org} is late, due by {fields.get('late_at')}: {why}"
            return "late", (org, why), summary
        case "rollout.halted", _:
            summary = (
                f"rollout {fields.get('rollout')} is halted: {fields.get('metric')} is worse by "
                f"{fields.get('effect')}, tolerated are {fields.get('tolerance')}; all orgs get the old one"
            )
            return "rollout", (fields.get("rollout"), "halted"), summary
        case "rollout.stalled", _:
            side = "new" if fields.get("side") == "to" else "old"
            summary = f"the {side} version of rollout {fields.get('rollout')} has had no runs for a day"
            return "rollout", (fields.get("rollout"), "stalled"), summary
        case "schedule.overdue", _:
            seconds = fields.get("seconds")
            summary = f"no worker fires schedules: {definition} of {org} has been due for {seconds} s"
            return "overdue", (), summary
        case "provisioning.failed", _:
            issuer, error = fields.get("issuer"), fields.get("error")
            summary = f"orgs of issuer {issuer} cannot be provisioned: {error}"
            return "provisioning_failed", ("org", issuer, error), summary
        case "provisioning.unavailable", _:
            issuer, error = fields.get("issuer"), fields.get("error")
            summary = f"orgs of issuer {issuer} are not compared with the provider's: {error}"
            return "provisioning_failed", ("issuer", issuer, error), summary
        case "price.missing", _:
            model, of = fields.get("model"), fields.get("provider")
            summary = (
                f"{model}{f' of {of}' if of else ''} has no price: what runs use of it counts as unpriced"
            )
            return "unpriced", (of, model), summary
        case "budget.forecast", _:
            per, limit, reaches_at = fields.get("per"), fields.get("limit"), fields.get("reaches_at")
            summary = f"at this pace {org} reaches its budget of {limit} per {per} on {str(reaches_at)[:10]}"
            return "forecast", (org, per, fields.get("resets_at")), summary
        case "egress.denied", _:
            origin = fields.get("origin")
            summary = f"{handler} was denied requests to {origin}: {reason}"
            return "egress_denied", (handler, origin), summary
        case "files.opened", _:
            undone = "its mode is restored" if fields.get("restored") else "another account owns it"
            summary = f"{fields.get('path')} was opened to other accounts ({fields.get('mode')}); {undone}"
            return "files_opened", (fields.get("path"),), summary
        case "files.changeable", _:
            summary = f"handlers could open {fields.get('path')} to other accounts; `doctor` has the fix"
            return "files_changeable", (fields.get("path"),), summary
        case _:
            return "credential_dead", (org,), f"{org} gets no token: {fields.get('error')}"


# The events that report a cause, by run state; looked up at every event.
_STATES: Mapping[str, frozenset[str | None]] = {
    "run.ended": frozenset({"failed", "refused"}),
    "run.recovered": frozenset({"failed"}),
    **dict.fromkeys(
        (
            *("definition.paused", "run.asks", "org.parked", "credential.unusable", "schedule.overdue"),
            *("provisioning.failed", "provisioning.unavailable", "files.opened", "files.changeable"),
            *("egress.denied", "schedule.late", "price.missing", "budget.forecast"),
            *("rollout.halted", "rollout.stalled"),
        ),
        frozenset({None}),
    ),
}


KEY_PREFIX = "whsec_"


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of the header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()}"


class Webhook:
    """The configured receiver of alerts; it recognises duplicates by their id."""

    def __init__(self, url: str, secret: str, clock: Clock, *, client: httpx.Client | None = None) -> None:
        self._url = url
        self._secret = secret
        self._clock = clock
        # Redirects are not followed: the signature is for this receiver.
        self._client = client or httpx.Client(timeout=10.0)
        masker.register(secret)

    def close(self) -> None:
        self._client.close()

    def post(self, alert: Alert) -> str | None:
        """Post it once; returns why it was not accepted, or None."""
        body = masker.mask(json.dumps(alert.as_json(), default=str), ALL_ORGS).encode()
        timestamp = int(self._clock.now().timestamp())
        message_id = f"{alert.id}-{alert.status}"
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, message_id, timestamp, body),
        }
        try:
            response = self._client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            return type(error).__name__
        return None if response.is_success else f"status {response.status_code}"


def _key(secret: str) -> bytes:
    """A Standard Webhooks key is `whsec_` plus base64; any other text is the key itself."""
    if secret.startswith(KEY_PREFIX):
        with contextlib.suppress(ValueError):
            return base64.b64decode(secret.removeprefix(KEY_PREFIX), validate=True)
    return secret.encode()
