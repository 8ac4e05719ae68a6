"""Token cache: one enforced token per org, audience and scopes, requested once and renewed early."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import httpx

from worker.bounded import Sized, remember
from worker.clock import Clock
from worker.errors import (
    ConfigurationError,
    CredentialsRejected,
    RequestRejected,
    Throttled,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.guard.issuer import Issuer
from worker.guard.single_flight import SingleFlight
from worker.ids import OrgId
from worker.model.claims import MIN_CLAIMS_AGE, MINTED_SERVES, Enforced, usable_life
from worker.model.orgs import OrgRef, TokenWant
from worker.telemetry.events import emit
from worker.tokens.acquirer import Acquirer
from worker.tokens.credentials import Credential, CredentialSource, Generations
from worker.tokens.issuer_client import IssuerClient
from worker.tokens.shared import LOOK, SharedTokens, TokenRequest

# Bytes of cached tokens, by default; an estimate of what one takes besides its text, in Python 3.11.
MEMORY = 512 * 1024 * 1024
SIZE_OF_TOKEN = 2_000
MAX_OUTDATED = 20_000
OUTDATE_EVERY = 60.0  # seconds between two new tokens of an org whose claims are refused
RENEW_AGAIN = 60.0  # seconds, after a new token was refused while the older one is still valid


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
        memory: int = MEMORY,
    ) -> None:
        """`memory` limits the bytes of cached tokens."""
        self._clock = clock
        self._shared = shared
        self._generations = Generations(credentials, clock=clock)
        rng = rng or random.SystemRandom()
        self._acquirers = {
            name: Acquirer(IssuerClient(issuer, client, clock=clock), credentials, clock=clock, rng=rng)
            for name, issuer in issuers.items()
        }
        self._tokens: Sized[TokenRequest, Enforced] = Sized(memory, _size_of)
        self._outdated: OrderedDict[TokenRequest, float] = OrderedDict()
        self._refreshing: SingleFlight[TokenRequest, Enforced] = SingleFlight(report=emit)

    async def ensure(self, want: TokenWant) -> Enforced:
        """A usable token, from the cache or newly requested.

        Concurrent callers share one request, which a caller's cancellation does not end. A cached token
        that is too old for `max_age` is replaced; if that fails, one that is still valid is returned,
        except with `fresh`.

        Raises:
            TokenRefused: the issuer's token fails verification or enforcement.
            CredentialsRejected, RequestRejected: the request is parked for `.retry_after` seconds,
                or until the org has other credentials.
            Throttled, Unavailable: no token, or no verdict on it, yet; see `.retry_after`.
        """
        acquirer = self._acquirer(want.issuer)
        request = _request_of(want, acquirer.client.issuer)
        credentials = await self._generations.of(want.org)
        cached = self._cached(request, credentials)
        now = self._clock.monotonic()
        if cached is not None and cached.serves(want, now):
            if now >= cached.renew_at and acquirer.may_ask(request, credentials):
                renewal = want._replace(fresh=False)
                self._refreshing.start(request, lambda: self._refresh(acquirer, request, renewal))
            return cached
        if request in self._refreshing:
            acquirer.client.budget.hurry(want.org.code)
        try:
            return await self._refreshing.join(request, lambda: self._refresh(acquirer, request, want))
        except (CredentialsRejected, RequestRejected, Throttled, Unavailable):
            if cached is None or want.fresh or not cached.is_alive(self._clock):
                raise
            return cached

    def at_hand(self, want: TokenWant) -> Enforced | None:
        """The cached token that `ensure` would return if it need not be renewed soon, else None.

        Most runs find theirs so, without a coroutine or a request; after a restart in what `look_up` read.

        Raises:
            RequestRejected: the issuer has no audience.
        """
        acquirer, credentials = self._acquirers.get(want.issuer), self._generations.confirmed(want.org)
        if acquirer is None or credentials is None:
            return None
        request = _request_of(want, acquirer.client.issuer)
        cached = self._cached(request, credentials) or self._looked_up(acquirer, request, credentials)
        if cached is None:
            return None
        now = self._clock.monotonic()
        return cached if now < cached.renew_at and cached.serves(want, now) else None

    async def load(self, orgs: Sequence[OrgRef]) -> Collection[OrgId]:
        """Confirm the credentials of these orgs in one query, so that `ensure` need not wait for them.

        Returns those that are new here: their stored tokens may be looked up.
        """
        return await self._generations.load(orgs)

    async def look_up(self, wanted: Sequence[TokenWant]) -> None:
        """Read the stored tokens of these in one query, for `at_hand` and `ensure` shortly after."""
        if self._shared is not None:
            requests = [request for _, request in self._requests_of(wanted)]
            with suppress(Unavailable):
                await self._shared.look_up([each for each in requests if self._tokens.peek(each) is None])

    async def outdate(self, want: TokenWant) -> None:
        """Request a new token for the next run: the claims of the present one were refused.

        They may be corrected by then. At most once a minute for a token; until a new one comes, the
        present one serves.
        """
        acquirer, now = self._acquirers.get(want.issuer), self._clock.monotonic()
        if acquirer is None:
            return
        request = _request_of(want, acquirer.client.issuer)
        known = self._tokens.peek(request)
        if known is None or now - self._outdated.get(request, float("-inf")) < OUTDATE_EVERY:
            return
        remember(self._outdated, request, now, MAX_OUTDATED)
        self._tokens.put(request, replace(known, usable_until=now))
        if self._shared is not None:
            await self._shared.drop(request)

    async def prepare(self, want: TokenWant) -> float | None:
        """Request a token, ahead of the run that needs it, that is usable `covers` seconds from now.

        Not if a stored one is, if another process requests it, or if the org is parked; other requests
        pass it. Returns the seconds after which to call it again, or None if there is nothing left to
        do. Whatever fails is left to the run: nothing is raised.
        """
        shared, acquirer = self._shared, self._acquirers.get(want.issuer)
        if shared is None or acquirer is None:
            return None
        with suppress(WorkerError):
            request = _request_of(want, acquirer.client.issuer)
            credentials = await self._generations.of(want.org)
            if (life := await shared.life(request)) is not None:
                usable = usable_life(sum(life))
                if life[0] + want.covers < usable:
                    return None
                if want.covers >= usable:
                    # No token lives that long: the next one must be newer.
                    return max(want.covers - usable / 2, 1.0)
            if not acquirer.may_ask(request, credentials) or request in self._refreshing:
                return None
            if await shared.reserve(request):
                if request in self._refreshing:
                    # A run's request has begun meanwhile, and waits for this reservation.
                    await shared.release(request)
                    return None
                await self._refreshing.join(
                    request, lambda: self._request(acquirer, request, minted=False, ahead=True)
                )
        return None

    async def not_covered(self, wanted: Sequence[TokenWant]) -> list[TokenWant]:
        """Those that have no stored token, or one that does not last `covers` seconds; in one query.

        Raises Unavailable.
        """
        if self._shared is None:
            return []
        asked = self._requests_of(wanted)
        lives = await self._shared.lives([request for _, request in asked])
        return [
            want
            for (want, _), life in zip(asked, lives, strict=True)
            if life is None or life[0] + want.covers >= usable_life(sum(life))
        ]

    def ahead_in(self, issuer: str) -> float:
        """Seconds until tokens of this issuer may be requested ahead of time; 0 if it is unknown."""
        acquirer = self._acquirers.get(issuer)
        return 0.0 if acquirer is None else acquirer.client.budget.ahead_in

    def share(self, workers: int) -> None:
        """Keep to the part of each issuer's rate that one of this number of workers has."""
        for acquirer in self._acquirers.values():
            acquirer.client.budget.share(workers)

    def drop(self, org_id: OrgId) -> None:
        """Forget all of an org: its tokens, its credentials, its parking."""
        self._tokens.drop_where(lambda request: request.org.id == org_id)
        self._generations.forget(org_id)
        if self._shared is not None:
            self._shared.forget(org_id)
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

    def _requests_of(self, wanted: Sequence[TokenWant]) -> list[tuple[TokenWant, TokenRequest]]:
        """Each with its request; without those that have no issuer or audience, which their runs report."""
        found = []
        for want in wanted:
            if (acquirer := self._acquirers.get(want.issuer)) is not None:
                with suppress(RequestRejected):
                    found.append((want, _request_of(want, acquirer.client.issuer)))
        return found

    def _looked_up(
        self, acquirer: Acquirer, request: TokenRequest, credentials: tuple[Credential, ...]
    ) -> Enforced | None:
        """The stored token that was looked up; None unless it serves, which `ensure` then handles."""
        if self._shared is None or request in self._refreshing:
            return None
        stored = self._shared.at_hand(request, credentials)
        enforced = None if stored is None else acquirer.enforce_at_once(request, stored)
        if enforced is None or self._clock.monotonic() >= enforced.usable_until:
            return None
        self._tokens.put(request, enforced)
        return enforced

    def _cached(self, request: TokenRequest, credentials: tuple[Credential, ...]) -> Enforced | None:
        cached = self._tokens.get(request)
        if cached is None:
            return None
        if cached.is_alive(self._clock) and cached.credential_id in [each.id for each in credentials]:
            return cached
        # Expired, or its generation was retired, perhaps because its secret leaked.
        self._tokens.pop(request)
        return None

    async def _refresh(self, acquirer: Acquirer, request: TokenRequest, want: TokenWant) -> Enforced:
        if self._shared is not None:
            stored = await self._stored(self._shared, acquirer, request, want)
            if stored is not None:
                return stored
        return await self._request(acquirer, request, minted=want.fresh)

    async def _request(
        self, acquirer: Acquirer, request: TokenRequest, *, minted: bool, ahead: bool = False
    ) -> Enforced:
        """Request a new token, and store it for other processes; ends a reservation."""
        credentials = await self._generations.of(request.org)
        if acquirer.is_parked(request, credentials):
            # A new secret releases it at once.
            credentials = await self._generations.of(request.org, newest=True)
        try:
            enforced, granted = await acquirer.acquire(request, credentials, minted=minted, ahead=ahead)
        except TokenRefused as refused:
            older = self._tokens.peek(request)
            if older is not None and refused.reason == "token_invalid":
                self._tokens.put(request, replace(older, renew_at=self._clock.monotonic() + RENEW_AGAIN))
            else:
                # The org has fewer rights now, which the older token does not show.
                self._tokens.pop(request)
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
        self._tokens.put(request, enforced)
        return enforced

    async def _stored(
        self, shared: SharedTokens, acquirer: Acquirer, request: TokenRequest, want: TokenWant
    ) -> Enforced | None:
        """A token that another process received, or None once this process may request one."""
        longest = None if want.max_age is None else max(want.max_age.total_seconds(), MIN_CLAIMS_AGE)
        while True:
            credentials = await self._generations.of(request.org)
            known = self._tokens.peek(request)
            found = await shared.find(
                request,
                credentials,
                newest=partial(self._generations.of, request.org, newest=True),
                newer_than=None if known is None else known.received_at,
                max_age=MINTED_SERVES if want.fresh else longest,
            )
            if found is not None:
                try:
                    enforced = await acquirer.enforce(request, found, minted=want.fresh)
                except TokenRefused:
                    await shared.drop(request)
                else:
                    if self._clock.monotonic() < enforced.usable_until:
                        self._tokens.put(request, enforced)
                        shared.settle(request)
                        return enforced
            if acquirer.is_parked(request, credentials) or await shared.reserve(request):
                return None
            await self._clock.sleep(LOOK)


def _size_of(enforced: Enforced) -> int:
    # The claims are written in the text: what they take grows with it.
    return SIZE_OF_TOKEN + 2 * len(enforced.token.reveal())


def _request_of(want: TokenWant, issuer: Issuer) -> TokenRequest:
    """The request; `{org}` in its audience is the org's code. Raises RequestRejected without an audience."""
    org, audience, scopes, also_ask = want.org, want.audience or issuer.audience, want.scopes, want.also_ask
    if not audience:
        raise RequestRejected(
            f"issuer {issuer.name} has no audience, and without one no token can be verified",
            fix=f"set audience in [issuers.{issuer.name}], or in the definition",
        )
    # The request stays in memory with its token, so it has no empty set of its own.
    also_ask = also_ask - scopes if also_ask else also_ask
    audience = audience.replace("{org}", org.code)
    return TokenRequest(issuer.name, org, audience, scopes, also_ask, want.resource)
