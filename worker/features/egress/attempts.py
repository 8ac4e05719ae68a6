"""Attempts, as the broker serves them: what each may reach, with which values, and what it has sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from worker.features.egress.injection import InjectedValue, MaskForms
from worker.features.egress.requests import RequestRefused, RunRequest, shown
from worker.guard.urls import Origin, is_loopback, origin_of
from worker.model.egress import Gate, not_listed

# Origins of one attempt that are counted by themselves.
MAX_ORIGINS = 100
OTHERS = "others"
# Different statuses that are counted for an origin; others by their hundred.
MAX_STATUSES = 20
# Streams of one attempt at a time.
MAX_STREAMS = 256
# Tokens that one attempt may have at a time, and seconds for which one is masked after its last use: a
# service may still give an older one back.
MAX_TOKENS = 16
STALE = 3600.0


class OpenStream(Protocol):
    def close(self) -> None:
        """Close it now, with the connection of its request."""

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""


@dataclass(slots=True)
class Totals:
    """What an attempt has sent to one origin. Bytes are those of heads and bodies, without TLS."""

    requests: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    denied: int = 0
    waited: float = 0.0

    def answered(self, status: int) -> None:
        """Count an answer by its status, which a service chooses."""
        name = str(status)
        if name not in self.statuses and len(self.statuses) >= MAX_STATUSES:
            name = f"{name[0]}xx"
        self.statuses[name] = self.statuses.get(name, 0) + 1


@dataclass(slots=True)
class Held:
    """A token, and until when it is used, by the monotonic clock."""

    text: bytes = field(repr=False)
    until: float


# Asks the worker for a token of an attempt: number, whether a new one, audience, resource.
AskToken = Callable[[int, bool, str, str], Awaitable["Held"]]


class Wanted(NamedTuple):
    """A token for which a run has a placeholder, and the audience or the resource that it is for."""

    placeholder: bytes
    audience: str = ""
    resource: str = ""


class TokenMissing(Exception):
    """The worker has no token for the run now."""

    def __init__(self, code: str, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class ServedAttempt:
    """One attempt, from its first request until the worker ends it."""

    def __init__(self, fields: Mapping[str, Any], ask: AskToken) -> None:
        self.number: int = fields["number"]
        self.org: str = fields["org"]
        self.traced: bool = fields["traced"]
        # Whether the run has the token itself; then nothing is gained by masking it.
        self.revealed: bool = fields["revealed"]
        self.gate = Gate(fields["lists"], fields["api_origins"], fields["private_origins"], fields["owners"])
        insecure = frozenset(map(origin_of, fields["insecure_origins"]))
        # Configuration already refuses an unencrypted origin; this is the second line of defence.
        self._token_origins = frozenset(
            origin
            for origin in self.gate.api
            if origin.scheme == "https" or is_loopback(origin.host) or origin in insecure
        )
        # That of the run comes first.
        self._wanted = [Wanted(placeholder.encode(), *of) for placeholder, *of in fields["tokens"]]
        self._secrets: dict[Origin, list[InjectedValue]] = {}
        self._ask = ask
        # Of each, the newest is the last.
        self._held: dict[Wanted, list[Held]] = {}
        self._asking: dict[Wanted, asyncio.Task[Held]] = {}
        self._forms: dict[Origin, MaskForms] = {}
        # In the order in which they were opened.
        self.streams: dict[OpenStream, None] = {}
        self.stopped = False
        # Bytes of bodies that wait to be sent, and origins whose denial was reported.
        self.unsent = 0
        self.reported: set[str] = set()
        self.totals: dict[str, Totals] = {}

    def bind(self, fields: Mapping[str, Any]) -> None:
        """Take a bound secret."""
        header = fields["header"]
        value = InjectedValue(
            fields["placeholder"].encode(),
            fields["value"].encode(),
            None if header is None else header.lower().encode(),
        )
        self._secrets.setdefault(origin_of(fields["origin"]), []).append(value)
        self._forms.clear()

    def check(self, request: RunRequest) -> None:
        """Raise RequestRefused unless the lists allow the origin of a request."""
        if not self.gate.allows(request.origin):
            deniers = self.gate.deniers(request.origin)
            raise RequestRefused("denied", not_listed(shown(request.origin), deniers))

    def checks_address(self, request: RunRequest) -> bool:
        return self.gate.checks_address(request.origin, public=request.public)

    async def values(self, request: RunRequest) -> tuple[list[InjectedValue], list[InjectedValue]]:
        """The secrets for a request, and the tokens that may go to its origin. Raises TokenMissing.

        That of the run comes first, if it goes there; another if a header has its placeholder.
        """
        tokens: list[InjectedValue] = []
        for wanted in self._wanted:
            own = not (wanted.audience or wanted.resource)
            if self._goes_to(wanted, request.origin) and (own or _names(request, wanted)):
                held = await self._token(wanted, fresh=request.fresh)
                tokens.append(InjectedValue(wanted.placeholder, held.text))
        return list(self._secrets.get(request.origin, ())), tokens

    def adds_token(self, origin: Origin) -> bool:
        """Whether a request without an Authorization header gets the token of the run."""
        return origin in self._token_origins

    def is_masked(self, origin: Origin) -> bool:
        """Whether the origin gets something that the run has not, with any request."""
        if origin in self._secrets:
            return True
        return not self.revealed and any(self._goes_to(wanted, origin) for wanted in self._wanted)

    def masks(self, origin: Origin) -> MaskForms:
        """What is masked in answers of an origin now: all that it may have got so far, with any request.

        Look again for each part of an answer: a service may give back what a later request has brought it.
        """
        if origin not in self._forms:
            texts = [value.text for value in self._secrets.get(origin, ())]
            for wanted, held in self._held.items():
                if self._goes_to(wanted, origin) and not self.revealed:
                    texts += [each.text for each in held]
            self._forms[origin] = MaskForms(texts)
        return self._forms[origin]

    def _goes_to(self, wanted: Wanted, origin: Origin) -> bool:
        """Whether a token may go to an origin: that of its resource, or those of the org's API."""
        if wanted.resource:
            return origin == origin_of(wanted.resource)
        return origin in self._token_origins

    async def _token(self, wanted: Wanted, *, fresh: bool) -> Held:
        held, now = self._held.get(wanted, []), time.monotonic()
        # A run may ask for a fresh one with each request.
        if held and now < held[-1].until and (not fresh or len(held) >= MAX_TOKENS):
            return held[-1]
        asking = self._asking.get(wanted)
        if asking is None or asking.done():
            asking = self._asking[wanted] = asyncio.ensure_future(self._renewed(wanted, fresh))
        # Requests at the same time share the question; one that is cancelled does not end it.
        return await asyncio.shield(asking)

    async def _renewed(self, wanted: Wanted, fresh: bool) -> Held:
        held = await self._ask(self.number, fresh, wanted.audience, wanted.resource)
        now = time.monotonic()
        kept = [
            old for old in self._held.get(wanted, ()) if now < old.until + STALE and old.text != held.text
        ]
        self._held[wanted] = [*kept, held]
        self._forms.clear()
        return held

    def of(self, origin: Origin) -> Totals:
        """The totals of an origin, or those of all others once there are many."""
        name = shown(origin)
        if name not in self.totals and len(self.totals) >= MAX_ORIGINS:
            name = OTHERS
        return self.totals.setdefault(name, Totals())

    def stop(self) -> None:
        """Send nothing more, and close the connections of its requests."""
        self.stopped = True
        self.close_streams()

    def close_streams(self) -> None:
        for stream in list(self.streams):
            stream.close()

    def end(self) -> Sequence[dict[str, Any]]:
        """Drop its token and secrets; the rows of its totals."""
        self.stop()
        self._held.clear()
        self._secrets.clear()
        self._forms.clear()
        for asking in self._asking.values():
            asking.cancel()
        self._asking.clear()
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """The totals by origin."""
        return [
            {
                "origin": origin,
                "requests": of.requests,
                "bytes_out": of.bytes_out,
                "bytes_in": of.bytes_in,
                "statuses": dict(of.statuses),
                "denied": of.denied,
                "waited_seconds": round(of.waited, 3),
            }
            for origin, of in self.totals.items()
        ]


def _names(request: RunRequest, wanted: Wanted) -> bool:
    """Whether a request needs a token: its placeholder may be in Basic credentials too."""
    return any(wanted.placeholder in text or text[:6].lower() == b"basic " for _, text in request.headers)
