"""Token cache: one enforced token per org, audience and scopes, requested once and renewed early."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta

import httpx

from worker.claims.claims import AccessToken, Claims
from worker.claims.decode import decode, enforce
from worker.clock import Clock
from worker.errors import (
    ConfigurationError,
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    Throttled,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.ids import OrgId
from worker.orgs import OrgRef
from worker.telemetry.events import emit
from worker.tokens.breaker import IssuerPaused, K, Parking, drop_where, remember
from worker.tokens.credentials import Credential, CredentialSource, Generations
from worker.tokens.issuer import Issuer
from worker.tokens.issuer_client import GrantedToken, IssuerClient
from worker.tokens.shared import SharedTokens, TokenRequest
from worker.tokens.single_flight import SingleFlight

# All in seconds, unless a share.
CREDENTIAL_PARK = (60.0, 3600.0)
REQUEST_PARK = (900.0, 900.0)
TRANSIENT_PARK = (2.0, 60.0)
TRIES = 3  # for one request while the issuer fails, unless it already failed for this org
WINNER_KEPT = 900.0  # an older generation that worked is tried first for this long
NO_VERDICT_KEPT = 120.0
SCOPE_REFUSED = ("invalid_scope", "access_denied")
MAX_REMEMBERED, MAX_TOKENS = 10_000, 20_000
MIN_CLAIMS_AGE = 60.0  # the smallest max_claims_age of a definition
# The last part of a token's life is not handed out: a share of it, at most MARGIN.
MARGIN_SHARE, MARGIN = 0.2, 30.0
RENEW_FROM, RENEW_UNTIL = 0.6, 0.9  # renewed in the background at a random share of its usable life
RENEW_AGAIN = 60.0  # after a new token was refused while the older one is still valid
# An API that answers every token with 401 must not use up the budget of all orgs.
MINTED_SERVES = 2.0


@dataclass(frozen=True, slots=True)
class EnforcedToken:
    """A token that was verified and whose org, client and scopes were enforced; its times are monotonic.

    `minted` if a caller insisted on a new one.
    """

    token: AccessToken
    claims: Claims = field(repr=False)
    credential_id: str
    received_at: float
    renew_at: float
    usable_until: float
    expires_at: float
    minted: bool

    def is_alive(self, clock: Clock) -> bool:
        """Whether it has not expired on either clock: the monotonic one stops while a machine sleeps."""
        return clock.monotonic() < self.expires_at and clock.now() < self.token.expires_at

    def serves(self, max_age: timedelta | None, fresh: bool, now: float) -> bool:
        """Whether one that is alive is usable for long enough, and as new as required."""
        age = now - self.received_at
        if fresh:
            return self.minted and age < MINTED_SERVES
        if max_age is not None and age >= max(max_age.total_seconds(), MIN_CLAIMS_AGE):
            return False
        return now < self.usable_until


class Acquirer:
    """Requests, verifies and enforces tokens of one issuer; parks orgs whose credentials or requests fail."""

    def __init__(
        self, client: IssuerClient, source: CredentialSource, *, clock: Clock, rng: random.Random
    ) -> None:
        self.client = client
        self._source = source
        self._clock = clock
        self._rng = rng
        self._rejected: Parking[OrgId] = Parking(*CREDENTIAL_PARK, clock=clock)
        self._refused: Parking[TokenRequest] = Parking(*REQUEST_PARK, clock=clock)
        self._failing: Parking[OrgId] = Parking(*TRANSIENT_PARK, clock=clock)
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
        self, request: TokenRequest, credentials: Sequence[Credential], *, minted: bool = False
    ) -> tuple[EnforcedToken, GrantedToken]:
        """A new token of the org, verified and enforced; raises as `Tokens.ensure` does."""
        granted = self._no_verdict.pop(request, None)
        if granted is None or not self._is_worth_verifying(granted, credentials):
            self._check_parking(request, credentials)
            granted = await self._grant(request, credentials)
        return await self.enforce(request, granted, minted=minted), granted

    async def enforce(
        self, request: TokenRequest, granted: GrantedToken, *, minted: bool = False
    ) -> EnforcedToken:
        """Verify and enforce a token; raises as `Tokens.ensure` does."""
        try:
            return await self._enforce(request, granted, minted)
        except Unavailable:
            # Keep it: it is verified once its key is there, instead of requesting another.
            remember(self._no_verdict, request, granted, MAX_REMEMBERED)
            raise
        except TokenRefused as refused:
            emit("token.refused", **request.labels, reason=refused.reason, detail=refused.detail)
            raise

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

    async def _grant(self, request: TokenRequest, credentials: Sequence[Credential]) -> GrantedToken:
        """Request a token; the issuer sees at most two requests, not counting those without a response."""
        org = request.org.id
        candidates = self._in_order(org, credentials)
        scopes = request.scopes | request.also_ask
        tries = 1 if self._failing.failures(org, credentials) else TRIES
        started_at = self._clock.monotonic()
        for last in (False, True):
            credential = candidates[0]
            try:
                granted = await self.client.grant(
                    credential, audience=request.audience, scopes=scopes, tries=tries
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
        parking: Parking[K],
        key: K,
        error: CredentialsRejected | RequestRejected,
        request: TokenRequest,
        credentials: Sequence[Credential],
    ) -> None:
        seconds = parking.park(key, error, credentials)
        emit("org.parked", **request.labels, error=error.detail or error.code, seconds=round(seconds, 1))

    async def _count_use(self, credential: Credential, error: str | None) -> None:
        # The count is informational; it must not cost a token.
        with suppress(Unavailable):
            await self._source.used(credential.id, error)

    async def _enforce(self, request: TokenRequest, granted: GrantedToken, minted: bool) -> EnforcedToken:
        payload = await self.client.verify(granted.text, request.audience)
        claims = decode(payload, self.client.issuer.profile)
        client_id = granted.credential.client_id
        enforce(claims, org_code=request.org.code, client_id=client_id, scopes=request.scopes)
        received_at, now = granted.received_at, self._clock.now()
        age = self._clock.monotonic() - received_at
        left = (claims.expires_at - now).total_seconds()
        if granted.expires_in is not None:
            left = min(left, granted.expires_in - age)
        lifetime = age + left
        usable = lifetime - min(MARGIN, MARGIN_SHARE * lifetime)
        return EnforcedToken(
            token=AccessToken(granted.text, now + timedelta(seconds=left)),
            claims=claims,
            credential_id=granted.credential.id,
            received_at=received_at,
            renew_at=received_at + usable * self._rng.uniform(RENEW_FROM, RENEW_UNTIL),
            usable_until=received_at + usable,
            expires_at=received_at + lifetime,
            minted=minted,
        )


class Tokens:
    """The tokens of all orgs, in memory; with `shared` other processes use them too."""

    def __init__(
        self,
        issuers: Mapping[str, Issuer],
        credentials: CredentialSource,
        *,
        client: httpx.AsyncClient,
        clock: Clock,
        rng: random.Random | None = None,
        shared: SharedTokens | None = None,
    ) -> None:
        self._clock = clock
        self._shared = shared
        self._generations = Generations(credentials, clock=clock)
        rng = rng or random.SystemRandom()
        self._acquirers = {
            name: Acquirer(IssuerClient(issuer, client, clock=clock), credentials, clock=clock, rng=rng)
            for name, issuer in issuers.items()
        }
        self._tokens: OrderedDict[TokenRequest, EnforcedToken] = OrderedDict()
        self._refreshing: SingleFlight[TokenRequest, EnforcedToken] = SingleFlight()

    async def ensure(
        self,
        org: OrgRef,
        issuer: str,
        *,
        audience: str | None = None,
        scopes: frozenset[str] = frozenset(),
        also_ask: frozenset[str] = frozenset(),
        max_claims_age: timedelta | None = None,
        fresh: bool = False,
    ) -> EnforcedToken:
        """A usable token of this org, from the cache or newly requested.

        `scopes` are enforced; `also_ask`, the scopes of variants, are requested too but may
        be missing. Concurrent callers share one request, which a caller's cancellation does
        not end. `fresh` requests a new token, unless one was minted so in the last two
        seconds; so does `max_claims_age` (at least 60 s) if the cached one is older. If
        that fails, a token that is still valid is returned, except with `fresh`.

        Raises:
            TokenRefused: the issuer's token fails verification or enforcement.
            CredentialsRejected, RequestRejected: the request is parked for `.retry_after` seconds,
                or until the org has other credentials.
            Throttled, Unavailable: no token, or no verdict on it, yet; see `.retry_after`.
        """
        acquirer = self._acquirer(issuer)
        audience = _audience(acquirer.client.issuer, org, audience)
        request = TokenRequest(issuer, org, audience, scopes, also_ask - scopes)
        credentials = await self._generations.of(org)
        cached = self._cached(request, credentials)
        now = self._clock.monotonic()
        if cached is not None and cached.serves(max_claims_age, fresh, now):
            if now >= cached.renew_at and acquirer.may_ask(request, credentials):
                self._refreshing.start(request, lambda: self._refresh(acquirer, request, max_claims_age))
            return cached
        try:
            return await self._refreshing.join(
                request, lambda: self._refresh(acquirer, request, max_claims_age, fresh)
            )
        except (CredentialsRejected, RequestRejected, Throttled, Unavailable):
            if cached is None or fresh or not cached.is_alive(self._clock):
                raise
            return cached

    def drop(self, org_id: OrgId) -> None:
        """Forget all of an org: its tokens, its credentials, its parking."""
        drop_where(self._tokens, lambda request: request.org.id == org_id)
        self._generations.forget(org_id)
        for acquirer in self._acquirers.values():
            acquirer.forget(org_id)

    async def close(self) -> None:
        await self._refreshing.close()
        if self._shared is not None:
            await self._shared.close()
        await self._generations.close()
        for acquirer in self._acquirers.values():
            await acquirer.client.close()

    def _acquirer(self, issuer: str) -> Acquirer:
        if issuer not in self._acquirers:
            raise ConfigurationError(
                f"worker.toml has no issuer {issuer!r}", fix=f"add a table [issuers.{issuer}] to worker.toml"
            )
        return self._acquirers[issuer]

    def _cached(self, request: TokenRequest, credentials: tuple[Credential, ...]) -> EnforcedToken | None:
        cached = self._tokens.get(request)
        if cached is None:
            return None
        known = any(credential.id == cached.credential_id for credential in credentials)
        if not known or not cached.is_alive(self._clock):
            # Expired, or its generation was retired, perhaps because its secret leaked.
            del self._tokens[request]
            return None
        self._tokens.move_to_end(request)
        return cached

    async def _refresh(
        self,
        acquirer: Acquirer,
        request: TokenRequest,
        max_age: timedelta | None,
        minted: bool = False,
    ) -> EnforcedToken:
        if self._shared is not None:
            stored = await self._stored(self._shared, acquirer, request, max_age, minted)
            if stored is not None:
                return stored
        credentials = await self._generations.of(request.org)
        if acquirer.is_parked(request, credentials):
            # A new secret releases it at once.
            credentials = await self._generations.of(request.org, newest=True)
        try:
            enforced, granted = await acquirer.acquire(request, credentials, minted=minted)
        except TokenRefused as refused:
            older = self._tokens.get(request)
            if older is not None and refused.reason == "token_invalid":
                self._tokens[request] = replace(older, renew_at=self._clock.monotonic() + RENEW_AGAIN)
            else:
                # The org has fewer rights now, which the older token does not show.
                self._tokens.pop(request, None)
                if self._shared is not None and refused.reason != "token_invalid":
                    await self._shared.drop(request)
            raise
        else:
            if self._shared is not None:
                left = enforced.expires_at - self._clock.monotonic()
                await self._shared.put(request, granted, left=left)
        finally:
            if self._shared is not None:
                await self._shared.release(request)
        remember(self._tokens, request, enforced, MAX_TOKENS)
        return enforced

    async def _stored(
        self,
        shared: SharedTokens,
        acquirer: Acquirer,
        request: TokenRequest,
        max_age: timedelta | None,
        minted: bool,
    ) -> EnforcedToken | None:
        """A token that another process received, or None once this process may request one."""
        longest = None if max_age is None else max(max_age.total_seconds(), MIN_CLAIMS_AGE)
        while True:
            credentials = await self._generations.of(request.org)
            known = self._tokens.get(request)
            found = await shared.find(
                request,
                credentials,
                newer_than=None if known is None else known.received_at,
                max_age=MINTED_SERVES if minted else longest,
            )
            if found is not None:
                try:
                    enforced = await acquirer.enforce(request, found, minted=minted)
                except TokenRefused:
                    await shared.drop(request)
                else:
                    if self._clock.monotonic() < enforced.usable_until:
                        remember(self._tokens, request, enforced, MAX_TOKENS)
                        return enforced
            if acquirer.is_parked(request, credentials) or await shared.reserve(request):
                return None
            await shared.wait()


def _audience(issuer: Issuer, org: OrgRef, asked: str | None) -> str:
    """The audience to request and to enforce; `{org}` in it is the org's code."""
    audience = asked or issuer.audience
    if not audience:
        raise RequestRejected(
            f"issuer {issuer.name} has no audience, and without one no token can be verified",
            fix=f"set audience in [issuers.{issuer.name}], or in the definition",
        )
    return audience.replace("{org}", org.code)
