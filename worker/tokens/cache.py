"""One enforced token per org, audience and scopes: asked for once, renewed early."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import httpx

from worker.claims.claims import AccessToken, Claims
from worker.clock import Clock
from worker.errors import (
    ConfigurationError,
    CredentialsRejected,
    RequestRejected,
    Throttled,
    TokenRefused,
    Unavailable,
)
from worker.ids import OrgId
from worker.orgs import OrgRef
from worker.tokens.acquire import Acquirer, Enforced, TokenRequest
from worker.tokens.credentials import Credential, CredentialSource, Generations
from worker.tokens.issuer import Issuer
from worker.tokens.issuer_client import IssuerClient
from worker.tokens.single_flight import SingleFlight

MIN_CLAIMS_AGE = 60.0  # a definition cannot ask for newer claims than this
# The last part of a token's life is not handed out: a share of it, at most so many seconds.
MARGIN_SHARE, MARGIN = 0.2, 30.0
RENEW_AGAIN = 60.0  # after a new token was refused while the older one still holds
# An API that answers every token with 401 must not use up the budget of all orgs.
MINTED_SERVES = 2.0
RENEW_FROM, RENEW_UNTIL = 0.6, 0.9  # somewhere in this share of its life it is renewed, beside its use


@dataclass(frozen=True, slots=True)
class EnforcedToken:
    """A token that was verified and whose org, client and scopes were enforced."""

    token: AccessToken
    claims: Claims = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A cached token, its times monotonic; `minted` where a caller insisted on a new one."""

    enforced: EnforcedToken
    credential_id: str
    received_at: float
    renew_at: float
    good_until: float
    expires_at: float
    minted: bool

    def is_alive(self, clock: Clock) -> bool:
        """Whether it has not expired; on both clocks, since one stands still while a machine sleeps."""
        return clock.monotonic() < self.expires_at and clock.now() < self.enforced.token.expires_at

    def serves(self, max_age: timedelta | None, fresh: bool, now: float) -> bool:
        """Whether one that is alive has some life left, and is as new as is wanted."""
        age = now - self.received_at
        if fresh:
            return self.minted and age < MINTED_SERVES
        if max_age is not None and age >= max(max_age.total_seconds(), MIN_CLAIMS_AGE):
            return False
        return now < self.good_until


class Tokens:
    """The tokens of all orgs, in memory only."""

    def __init__(
        self,
        issuers: Mapping[str, Issuer],
        credentials: CredentialSource,
        *,
        client: httpx.AsyncClient,
        clock: Clock,
        chance: random.Random | None = None,
        max_tokens: int = 20_000,
    ) -> None:
        self._clock = clock
        self._chance = chance or random.SystemRandom()
        self._max_tokens = max_tokens
        self._channels = {name: IssuerClient(issuer, client, clock=clock) for name, issuer in issuers.items()}
        self._generations = Generations(credentials, clock=clock)
        self._acquirer = Acquirer(credentials, clock=clock, chance=self._chance)
        self._entries: OrderedDict[TokenRequest, _Entry] = OrderedDict()
        self._refreshing: SingleFlight[TokenRequest, _Entry] = SingleFlight()

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
        """A token of this org that has some life left, from the cache or asked for now.

        `scopes` are enforced; `also_ask` are asked for with them and may be missing
        (those of variants). Many callers at once make one request, and a caller that
        is cancelled does not end it. With `fresh`, a new one is minted in any case, but
        for one that was minted so within the last two seconds;
        with `max_claims_age` (at least 60 s), where the cached one was received longer
        ago. Where a new one cannot be had, one that is still valid serves, unless
        `fresh` says that it does not.

        Raises:
            TokenRefused: the issuer's token fails verification or enforcement.
            CredentialsRejected, RequestRejected: no request is made before `.retry_after` seconds
                have passed, or the org has other credentials.
            Throttled, Unavailable: no token, or no verdict on it, yet; see `.retry_after`.
        """
        channel = self._channel(issuer)
        wanted = TokenRequest(
            issuer, org, _audience(channel.issuer, org, audience), scopes, also_ask - scopes
        )
        credentials = await self._generations.of(org)
        entry = self._entry(wanted, credentials)
        now = self._clock.monotonic()
        if entry is not None and entry.serves(max_claims_age, fresh, now):
            if now >= entry.renew_at and self._acquirer.may_ask(channel, wanted, credentials):
                self._refreshing.start(wanted, lambda: self._refresh(channel, wanted))
            return entry.enforced
        try:
            entry = await self._refreshing.join(wanted, lambda: self._refresh(channel, wanted, minted=fresh))
        except (CredentialsRejected, RequestRejected, Throttled, Unavailable):
            if entry is None or fresh or not entry.is_alive(self._clock):
                raise
        return entry.enforced

    def drop(self, org_id: OrgId) -> None:
        """Forget all of an org: its tokens, its credentials, its parking."""
        for wanted in [wanted for wanted in self._entries if wanted.org.id == org_id]:
            del self._entries[wanted]
        self._generations.forget(org_id)
        self._acquirer.forget(org_id)

    async def close(self) -> None:
        """End every refresh that is under way."""
        await self._refreshing.close()
        await self._generations.close()
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, issuer: str) -> IssuerClient:
        channel = self._channels.get(issuer)
        if channel is None:
            raise ConfigurationError(
                f"no issuer is called {issuer!r}", fix=f"add a table [issuers.{issuer}] to worker.toml"
            )
        return channel

    def _entry(self, wanted: TokenRequest, credentials: tuple[Credential, ...]) -> _Entry | None:
        entry = self._entries.get(wanted)
        if entry is None:
            return None
        known = any(credential.id == entry.credential_id for credential in credentials)
        if not known or not entry.is_alive(self._clock):
            # Expired, or its generation was retired: what leaked with that must not be used any longer.
            del self._entries[wanted]
            return None
        self._entries.move_to_end(wanted)
        return entry

    async def _refresh(self, channel: IssuerClient, wanted: TokenRequest, *, minted: bool = False) -> _Entry:
        credentials = await self._generations.of(wanted.org)
        if self._acquirer.is_parked(wanted, credentials):
            # A new secret releases it at once.
            credentials = await self._generations.of(wanted.org, newest=True)
        try:
            enforced = await self._acquirer.acquire(channel, wanted, credentials)
        except TokenRefused as refused:
            older = self._entries.get(wanted)
            if older is not None and refused.reason == "token_invalid":
                self._entries[wanted] = replace(older, renew_at=self._clock.monotonic() + RENEW_AGAIN)
            else:
                # The issuer says that the org has less now: the older token says too much.
                self._entries.pop(wanted, None)
            raise
        self._entries[wanted] = entry = self._new_entry(enforced, minted)
        while len(self._entries) > self._max_tokens:
            self._entries.popitem(last=False)
        return entry

    def _new_entry(self, enforced: Enforced, minted: bool) -> _Entry:
        received_at, lifetime = enforced.received_at, enforced.lifetime
        usable = lifetime - min(MARGIN, MARGIN_SHARE * lifetime)
        return _Entry(
            enforced=EnforcedToken(AccessToken(enforced.text, enforced.expires_at), enforced.claims),
            credential_id=enforced.credential.id,
            received_at=received_at,
            renew_at=received_at + usable * self._chance.uniform(RENEW_FROM, RENEW_UNTIL),
            good_until=received_at + usable,
            expires_at=received_at + lifetime,
            minted=minted,
        )


def _audience(issuer: Issuer, org: OrgRef, asked: str | None) -> str:
    """The audience to ask for and to insist on; `{org}` in it is the org's code."""
    audience = asked or issuer.audience
    if not audience:
        raise RequestRejected(
            f"issuer {issuer.name} has no audience, and without one no token can be verified",
            fix=f"set audience in [issuers.{issuer.name}], or in the definition",
        )
    return audience.replace("{org}", org.code)
