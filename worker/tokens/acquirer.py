"""Acquirer: requests, verifies and enforces tokens of one issuer; parks orgs and requests that fail.

These wait until their time is over or a new secret comes.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from worker.bounded import drop_where, remember
from worker.clock import Clock
from worker.errors import (
    AnswerTooLarge,
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.guard.decode import decode, enforce
from worker.ids import OrgId
from worker.model.claims import Enforced
from worker.telemetry.events import emit
from worker.tokens.breaker import IssuerPaused
from worker.tokens.credentials import Credential, CredentialSource
from worker.tokens.issuer_client import GrantedToken, IssuerClient
from worker.tokens.shared import TokenRequest

# All in seconds, unless a share.
CREDENTIAL_PARK = (60.0, 3600.0)
REQUEST_PARK = (900.0, 900.0)
TRANSIENT_PARK = (2.0, 60.0)
TRIES = 3  # for one request while the issuer fails, unless it already failed for this org
WINNER_KEPT = 900.0  # an older generation that worked is tried first for this long
NO_VERDICT_KEPT = 120.0
# The detail of a refusal of a token that has expired; one requested this lately had expired when it came.
EXPIRED = "expired"
NEW = 5.0
SCOPE_REFUSED = ("invalid_scope", "access_denied")
MAX_REMEMBERED = 10_000
# Renewed in the background at a random share of its usable life.
RENEW_FROM = 0.6
RENEW_UNTIL = 0.9


class Acquirer:
    """Requests, verifies and enforces tokens of one issuer; parks orgs whose credentials or requests fail."""

    def __init__(
        self, client: IssuerClient, source: CredentialSource, *, clock: Clock, rng: random.Random
    ) -> None:
        self.client = client
        self._source = source
        self._clock = clock
        self._rng = rng
        self._rejected: ParkedKeys[OrgId] = ParkedKeys(*CREDENTIAL_PARK, clock=clock)
        self._refused: ParkedKeys[TokenRequest] = ParkedKeys(*REQUEST_PARK, clock=clock)
        self._failing: ParkedKeys[OrgId] = ParkedKeys(*TRANSIENT_PARK, clock=clock)
        self._winners: OrderedDict[OrgId, tuple[str, float]] = OrderedDict()
        self._no_verdict: OrderedDict[TokenRequest, GrantedToken] = OrderedDict()

    def may_ask(self, request: TokenRequest, credentials: Sequence[Credential]) -> bool:
        """Whether a request that can wait may be sent: no parking, no pause, no open breaker."""
        return self.client.is_free and not self.is_parked(request, credentials)

    def is_parked(self, request: TokenRequest, credentials: Sequence[Credential]) -> bool:
        """Whether only other credentials, or time, allow this request."""
        try:
            self._check_parking(request, credentials)
        except WorkerError:
            return True
        return False

    async def acquire(
        self,
        request: TokenRequest,
        credentials: Sequence[Credential],
        *,
        minted: bool = False,
        ahead: bool = False,
    ) -> tuple[Enforced, GrantedToken]:
        """A new token of the org, verified and enforced; raises as `Tokens.ensure` does.

        `ahead` of the run that needs it, it lets all other requests pass.
        """
        granted = self._no_verdict.pop(request, None)
        if granted is None or not self._is_worth_verifying(granted, credentials):
            granted = await self._grant(request, credentials, ahead)
        for last in (False, True):
            try:
                return await self.enforce(request, granted, minted=minted, again=True), granted
            except TokenRefused as refused:
                if not self._is_outlived(granted, refused):
                    raise
            if not last:
                granted = await self._grant(request, credentials, ahead)
        raise IssuerUnavailable(f"two tokens of issuer {request.issuer} expired before they were verified")

    async def enforce(
        self, request: TokenRequest, granted: GrantedToken, *, minted: bool = False, again: bool = False
    ) -> Enforced:
        """Verify and enforce a token; raises as `Tokens.ensure` does.

        If it may be requested `again`, it is not reported that it has expired since it was asked for.
        """
        try:
            payload = await self.client.verify(granted.text, request.audience)
            return self._enforced(payload, request, granted, minted)
        except Unavailable:
            # Keep it: it is verified once its key is there, instead of requesting another.
            remember(self._no_verdict, request, granted, MAX_REMEMBERED)
            raise
        except TokenRefused as refused:
            if not (again and self._is_outlived(granted, refused)):
                emit("token.refused", **request.labels, reason=refused.reason, detail=refused.detail)
            raise

    def _is_outlived(self, granted: GrantedToken, refused: TokenRefused) -> bool:
        """Whether it expired only after it was asked for: its key was late, or this process stood still."""
        age = self._clock.monotonic() - granted.asked_at
        return refused.detail == EXPIRED and age >= NEW

    def enforce_at_once(self, request: TokenRequest, granted: GrantedToken) -> Enforced | None:
        """As `enforce`, without waiting; None if the token is refused, or without a verdict."""
        try:
            payload = self.client.verify_at_once(granted.text, request.audience)
            return None if payload is None else self._enforced(payload, request, granted, minted=False)
        except TokenRefused:
            return None

    def forget(self, org_id: OrgId) -> None:
        """Forget what was remembered of an org."""
        self._rejected.release(org_id)
        self._failing.release(org_id)
        self._winners.pop(org_id, None)
        self._refused.release_where(lambda request: request.org.id == org_id)
        drop_where(self._no_verdict, lambda request: request.org.id == org_id)

    def _check_parking(self, request: TokenRequest, credentials: Sequence[Credential]) -> None:
        self._rejected.check(request.org.id, credentials)
        self._refused.check(request, credentials)
        self._failing.check(request.org.id, credentials)

    def _is_worth_verifying(self, granted: GrantedToken, credentials: Sequence[Credential]) -> bool:
        age = self._clock.monotonic() - granted.received_at
        longest = min(NO_VERDICT_KEPT, granted.expires_in or NO_VERDICT_KEPT)
        return any(granted.credential.id == known.id for known in credentials) and age < longest

    async def _grant(
        self, request: TokenRequest, credentials: Sequence[Credential], ahead: bool
    ) -> GrantedToken:
        """Request a token; the issuer sees at most two requests, not counting those without a response."""
        self._check_parking(request, credentials)
        org = request.org.id
        candidates = self._in_order(org, credentials)
        scopes = request.scopes | request.also_ask
        tries = 1 if self._failing.failures(org, credentials) else TRIES
        started_at = self._clock.monotonic()
        for last in (False, True):
            credential = candidates[0]
            try:
                granted = await self.client.grant(
                    credential,
                    audience=request.audience,
                    scopes=scopes,
                    tries=tries,
                    ahead=ahead,
                    resource=request.resource,
                )
            except CredentialsRejected as rejected:
                await self._count_use(credential, rejected.detail)
                del candidates[0]
                if last or not candidates:
                    self._park(self._rejected, org, rejected, request, credentials)
                    raise
            except RequestRejected as refused:
                await self._count_use(credential, refused.detail)
                if last or refused.detail not in SCOPE_REFUSED or scopes == request.scopes:
                    self._park(self._refused, request, refused, request, credentials)
                    raise
                # A variant's scope that this org lacks must not cost it the definition's own.
                scopes = request.scopes
            except AnswerTooLarge as large:
                await self._count_use(credential, large.detail)
                self._park(self._refused, request, large, request, credentials)
                raise
            except IssuerPaused:
                raise
            except IssuerUnavailable as unavailable:
                self._failing.park(org, unavailable, credentials, share=self._rng.uniform(0.5, 1.0))
                raise
            else:
                break
        emit("token.requested", **request.labels, seconds=round(granted.received_at - started_at, 3))
        self._note_success(request, credential, credentials)
        await self._count_use(credential, None)
        return granted

    def _in_order(self, org: OrgId, credentials: Sequence[Credential]) -> list[Credential]:
        """The generations to try: the newest and the previous one; the one that last worked first."""
        newest = list(credentials[:2])
        failures = self._rejected.failures(org, credentials)
        if failures:
            # Both were rejected: from then on they take turns.
            return [newest[(failures + 1) % len(newest)]]
        winner, kept_until = self._winners.get(org, ("", 0.0))
        if self._clock.monotonic() < kept_until:
            newest.sort(key=lambda credential: credential.id != winner)
        return newest

    def _note_success(
        self, request: TokenRequest, credential: Credential, credentials: Sequence[Credential]
    ) -> None:
        org, now = request.org.id, self._clock.monotonic()
        self._rejected.release(org)
        self._failing.release(org)
        self._refused.release(request)
        if credential == credentials[0]:
            self._winners.pop(org, None)
        elif org not in self._winners or now >= self._winners[org][1]:
            remember(self._winners, org, (credential.id, now + WINNER_KEPT), MAX_REMEMBERED)

    def _park(
        self,
        parking: ParkedKeys[K],
        key: K,
        error: CredentialsRejected | RequestRejected | AnswerTooLarge,
        request: TokenRequest,
        credentials: Sequence[Credential],
    ) -> None:
        seconds = parking.park(key, error, credentials)
        emit("org.parked", **request.labels, error=error.detail or error.code, seconds=round(seconds, 1))

    async def _count_use(self, credential: Credential, error: str | None) -> None:
        # The count is informational; it must not cost a token.
        with suppress(Unavailable):
            await self._source.used(credential, error)

    def _enforced(
        self, payload: Mapping[str, Any], request: TokenRequest, granted: GrantedToken, minted: bool
    ) -> Enforced:
        claims = decode(payload, self.client.issuer.profile)
        client_id = granted.credential.client_id
        enforce(claims, org_code=request.org.code, client_id=client_id, scopes=request.scopes)
        return Enforced.of(
            granted.text,
            claims,
            self._clock,
            received_at=granted.received_at,
            expires_in=granted.expires_in,
            credential_id=granted.credential.id,
            renewed_at_share=self._rng.uniform(RENEW_FROM, RENEW_UNTIL),
            minted=minted,
        )


K = TypeVar("K", bound=Hashable)
Parkable = CredentialsRejected | RequestRejected | IssuerUnavailable
MAX_PARKED = 50_000
ASKED_LONGEST = 300.0  # seconds; caps an issuer's Retry-After


class _Parked(NamedTuple):
    error: Parkable
    until: float
    failures: int
    credentials: tuple[Credential, ...]


@dataclass(eq=False, repr=False)
class ParkedKeys(Generic[K]):
    """Keys parked after a failure, for `first` to `last` seconds; new credentials release them at once."""

    first: float
    last: float
    clock: Clock
    _keys: OrderedDict[K, _Parked] = field(default_factory=OrderedDict, init=False)

    def check(self, key: K, credentials: Sequence[Credential]) -> None:
        """Raise the error that the key is parked for, with `retry_after`, if it is parked now."""
        parked = self._parked(key, credentials)
        left = parked.until - self.clock.monotonic() if parked else 0.0
        if parked and left > 0:
            # A copy: each raise of one exception would add to its traceback.
            error = copy.copy(parked.error)
            error.retry_after = left
            raise error

    def failures(self, key: K, credentials: Sequence[Credential]) -> int:
        """The number of failures in a row with these credentials."""
        parked = self._parked(key, credentials)
        return parked.failures if parked else 0

    def park(
        self, key: K, error: Parkable, credentials: Sequence[Credential], *, share: float = 1.0
    ) -> float:
        """Park the key for `share` of its time; sets the error's `retry_after` and returns the seconds."""
        failures = self.failures(key, credentials)
        seconds = min(self.first * 2.0**failures, self.last) * share
        seconds = max(seconds, min(error.retry_after or 0.0, ASKED_LONGEST))
        until = self.clock.monotonic() + seconds
        parked = _Parked(copy.copy(error), until, min(failures + 1, 20), tuple(credentials))
        remember(self._keys, key, parked, MAX_PARKED)
        error.retry_after = seconds
        return seconds

    def release(self, key: K) -> None:
        self._keys.pop(key, None)

    def release_where(self, matches: Callable[[K], bool]) -> None:
        drop_where(self._keys, matches)

    def _parked(self, key: K, credentials: Sequence[Credential]) -> _Parked | None:
        parked = self._keys.get(key)
        if parked is not None and parked.credentials != tuple(credentials):
            del self._keys[key]
            return None
        return parked
