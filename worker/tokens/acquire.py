"""What is not asked for until a time: an org whose credentials or requests failed."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Generic, NamedTuple, TypeVar

from worker.claims.claims import Claims
from worker.claims.decode import decode, enforce
from worker.clock import Clock
from worker.errors import (
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.ids import OrgId
from worker.orgs import OrgRef
from worker.telemetry.events import emit
from worker.tokens.breaker import IssuerPaused
from worker.tokens.credentials import Credential, CredentialSource
from worker.tokens.grant import GrantedToken
from worker.tokens.issuer_client import IssuerClient

K = TypeVar("K", bound=Hashable)
Parkable = CredentialsRejected | RequestRejected | IssuerUnavailable
MAX_PARKED = 50_000
ASKED_LONGEST = 300.0  # what an issuer's Retry-After can make of it


@dataclass(slots=True)
class _Place:
    error: Parkable
    until: float
    failures: int
    credentials: tuple[Credential, ...]


class Parking(Generic[K]):
    """Keys parked after a failure, for a time that doubles; other credentials release them at once."""

    def __init__(self, first: float, last: float, *, clock: Clock) -> None:
        self._first = first
        self._last = last
        self._clock = clock
        self._places: OrderedDict[K, _Place] = OrderedDict()

    def check(self, key: K, credentials: Sequence[Credential]) -> None:
        """Raise the error that the key is parked for, with `retry_after`; nothing is asked meanwhile."""
        place = self._place(key, credentials)
        left = place.until - self._clock.monotonic() if place else 0.0
        if place and left > 0:
            # A copy: one exception must not be raised to many, each adding to its traceback.
            error = copy.copy(place.error)
            error.retry_after = left
            raise error

    def failures(self, key: K, credentials: Sequence[Credential]) -> int:
        """How many failures in a row, with these credentials."""
        place = self._place(key, credentials)
        return place.failures if place else 0

    def park(
        self, key: K, error: Parkable, credentials: Sequence[Credential], *, share: float = 1.0
    ) -> float:
        """Park the key for `share` of its time; sets the error's `retry_after` and returns the seconds."""
        failures = self.failures(key, credentials)
        seconds = min(self._first * 2.0**failures, self._last) * share
        seconds = max(seconds, min(error.retry_after or 0.0, ASKED_LONGEST))
        self._places[key] = _Place(
            error=copy.copy(error),
            until=self._clock.monotonic() + seconds,
            failures=min(failures + 1, 20),
            credentials=tuple(credentials),
        )
        while len(self._places) > MAX_PARKED:
            self._places.popitem(last=False)
        error.retry_after = seconds
        return seconds

    def release(self, key: K) -> None:
        """Forget the key's failures."""
        self._places.pop(key, None)

    def release_where(self, is_meant: Callable[[K], bool]) -> None:
        """Forget the failures of every key that is meant."""
        for key in [key for key in self._places if is_meant(key)]:
            del self._places[key]

    def _place(self, key: K, credentials: Sequence[Credential]) -> _Place | None:
        place = self._places.get(key)
        if place is not None and place.credentials != tuple(credentials):
            del self._places[key]
            return None
        return place


CREDENTIAL_PARK = (60.0, 3600.0)
REQUEST_PARK = (900.0, 900.0)
TRANSIENT_PARK = (2.0, 60.0)
TRIES = 3  # of one request, while the issuer fails and did not fail for this org before
WINNER_KEPT = 900.0  # for so long an older generation that worked is tried first
NO_VERDICT_KEPT = 120.0
SCOPE_REFUSED = ("invalid_scope", "access_denied")
MAX_REMEMBERED = 10_000

V = TypeVar("V")
Place = tuple[str, OrgId]  # an org at an issuer


class TokenRequest(NamedTuple):
    """What a token is wanted for; `scopes` are enforced, `also_ask` are only asked for.

    A key that is looked up for each run: a tuple's hash costs a tenth of a dataclass's.
    """

    issuer: str
    org: OrgRef
    audience: str
    scopes: frozenset[str]
    also_ask: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Enforced:
    """A token that holds; `lifetime` is in seconds from `received_at`, which is monotonic."""

    text: str = field(repr=False)
    claims: Claims = field(repr=False)
    credential: Credential
    received_at: float
    lifetime: float
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class _Granted:
    token: GrantedToken
    credential: Credential
    received_at: float


class Acquirer:
    """Gets tokens and remembers what failed: orgs by their credentials, requests by what they asked for."""

    def __init__(self, source: CredentialSource, *, clock: Clock, chance: random.Random) -> None:
        self._source = source
        self._clock = clock
        self._chance = chance
        self._rejected: Parking[Place] = Parking(*CREDENTIAL_PARK, clock=clock)
        self._refused: Parking[TokenRequest] = Parking(*REQUEST_PARK, clock=clock)
        self._failing: Parking[Place] = Parking(*TRANSIENT_PARK, clock=clock)
        self._winners: OrderedDict[Place, tuple[str, float]] = OrderedDict()
        self._no_verdict: OrderedDict[TokenRequest, _Granted] = OrderedDict()

    def is_parked(self, wanted: TokenRequest, credentials: Sequence[Credential]) -> bool:
        """Whether only other credentials, or time, let this be asked for."""
        try:
            self._check_parking(wanted, credentials)
        except WorkerError:
            return True
        return False

    def may_ask(self, channel: IssuerClient, wanted: TokenRequest, credentials: Sequence[Credential]) -> bool:
        """Whether nothing stands against a request that can wait: parking, a pause, an open breaker."""
        return channel.is_free and not self.is_parked(wanted, credentials)

    async def acquire(
        self, channel: IssuerClient, wanted: TokenRequest, credentials: Sequence[Credential]
    ) -> Enforced:
        """A new token of the org, verified and enforced; raises as `Tokens.ensure` does."""
        granted = self._no_verdict.pop(wanted, None)
        if granted is None or not self._is_worth_judging(granted, credentials):
            self._check_parking(wanted, credentials)
            granted = await self._grant(channel, wanted, credentials)
        try:
            return await self._enforce(channel, wanted, granted)
        except Unavailable:
            # It was paid for: judged once its key is there, not asked for again.
            _remember(self._no_verdict, wanted, granted)
            raise
        except TokenRefused as refused:
            emit(
                "token.refused",
                org=wanted.org.code,
                issuer=wanted.issuer,
                reason=refused.reason,
                detail=refused.detail,
            )
            raise

    def forget(self, org_id: OrgId) -> None:
        """Forget what was remembered of an org."""
        for parking in (self._rejected, self._failing):
            parking.release_where(lambda place: place[1] == org_id)
        self._refused.release_where(lambda wanted: wanted.org.id == org_id)
        for place in [place for place in self._winners if place[1] == org_id]:
            del self._winners[place]
        for wanted in [wanted for wanted in self._no_verdict if wanted.org.id == org_id]:
            del self._no_verdict[wanted]

    def _check_parking(self, wanted: TokenRequest, credentials: Sequence[Credential]) -> None:
        self._rejected.check(_place(wanted), credentials)
        self._refused.check(wanted, credentials)
        self._failing.check(_place(wanted), credentials)

    def _is_worth_judging(self, granted: _Granted, credentials: Sequence[Credential]) -> bool:
        age = self._clock.monotonic() - granted.received_at
        longest = min(NO_VERDICT_KEPT, granted.token.expires_in or NO_VERDICT_KEPT)
        return any(granted.credential.id == known.id for known in credentials) and age < longest

    async def _grant(
        self, channel: IssuerClient, wanted: TokenRequest, credentials: Sequence[Credential]
    ) -> _Granted:
        """Ask for a token with at most two requests, not counting those that get no answer."""
        place = _place(wanted)
        candidates = self._in_order(place, credentials)
        scopes = wanted.scopes | wanted.also_ask
        tries = 1 if self._failing.failures(place, credentials) else TRIES
        started_at = self._clock.monotonic()
        for last in (False, True):
            credential = candidates[0]
            try:
                token = await channel.grant(credential, audience=wanted.audience, scopes=scopes, tries=tries)
            except CredentialsRejected as rejected:
                await self._count_use(credential, rejected.detail)
                del candidates[0]
                if last or not candidates:
                    self._park(self._rejected, place, rejected, wanted, credentials)
                    raise
            except RequestRejected as refused:
                await self._count_use(credential, refused.detail)
                if last or refused.detail not in SCOPE_REFUSED or scopes == wanted.scopes:
                    self._park(self._refused, wanted, refused, wanted, credentials)
                    raise
                # A variant's scope that this org was not given must not cost it the definition's own.
                scopes = wanted.scopes
            except IssuerPaused:
                raise
            except IssuerUnavailable as unavailable:
                share = self._chance.uniform(0.5, 1.0)
                self._failing.park(place, unavailable, credentials, share=share)
                raise
            else:
                break
        received_at = self._clock.monotonic()
        emit(
            "token.requested",
            org=wanted.org.code,
            issuer=wanted.issuer,
            seconds=round(received_at - started_at, 3),
        )
        self._note_success(wanted, credential, credentials)
        await self._count_use(credential, None)
        return _Granted(token, credential, received_at)

    def _in_order(self, place: Place, credentials: Sequence[Credential]) -> list[Credential]:
        """The generations to try: the newest, then the one before it; the one that last worked first."""
        newest = list(credentials[:2])
        failures = self._rejected.failures(place, credentials)
        if failures:
            # Both were rejected. From then on one a time, in turn.
            return [newest[(failures + 1) % len(newest)]]
        winner, kept_until = self._winners.get(place, ("", 0.0))
        if self._clock.monotonic() < kept_until:
            newest.sort(key=lambda credential: credential.id != winner)
        return newest

    def _note_success(
        self, wanted: TokenRequest, credential: Credential, credentials: Sequence[Credential]
    ) -> None:
        place = _place(wanted)
        self._rejected.release(place)
        self._failing.release(place)
        self._refused.release(wanted)
        if credential == credentials[0]:
            self._winners.pop(place, None)
        elif place not in self._winners or self._clock.monotonic() >= self._winners[place][1]:
            _remember(self._winners, place, (credential.id, self._clock.monotonic() + WINNER_KEPT))

    def _park(
        self,
        parking: Parking[K],
        key: K,
        error: CredentialsRejected | RequestRejected,
        wanted: TokenRequest,
        credentials: Sequence[Credential],
    ) -> None:
        seconds = parking.park(key, error, credentials)
        emit(
            "org.parked",
            org=wanted.org.code,
            issuer=wanted.issuer,
            error=error.detail or error.code,
            seconds=round(seconds, 1),
        )

    async def _count_use(self, credential: Credential, error: str | None) -> None:
        # The count is for people; no token is lost for it.
        with suppress(Unavailable):
            await self._source.used(credential.id, error)

    async def _enforce(self, channel: IssuerClient, wanted: TokenRequest, granted: _Granted) -> Enforced:
        token, credential = granted.token, granted.credential
        payload = await channel.verify(token.text, wanted.audience)
        claims = decode(payload, channel.issuer.profile)
        enforce(
            claims,
            org_code=wanted.org.code,
            client_id=credential.client_id,
            scopes=wanted.scopes,
        )
        now, age = self._clock.now(), self._clock.monotonic() - granted.received_at
        left = (claims.expires_at - now).total_seconds()
        if token.expires_in is not None:
            left = min(left, token.expires_in - age)
        return Enforced(
            text=token.text,
            claims=claims,
            credential=credential,
            received_at=granted.received_at,
            lifetime=age + left,
            expires_at=now + timedelta(seconds=left),
        )


def _place(wanted: TokenRequest) -> Place:
    return wanted.issuer, wanted.org.id


def _remember(memory: OrderedDict[K, V], key: K, value: V) -> None:
    """Add to a memory that holds a bounded number, the newest."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
