"""One enforced token per org, audience and scopes: asked for once, renewed early."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import httpx

from worker.claims.access_token import AccessToken
from worker.claims.claims import Claims
from worker.clock import Clock
from worker.ids import OrgId
from worker.tokens.credentials import CredentialSource, OrgRef
from worker.tokens.issuer import Issuer


@dataclass(frozen=True, slots=True)
class EnforcedToken:
    """A token that was verified and whose org, client and scopes were enforced."""

    token: AccessToken
    claims: Claims = field(repr=False)


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
        max_tokens: int = 50_000,
    ) -> None:
        raise NotImplementedError

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
        is cancelled does not end it. With `fresh`, a new one is minted in any case;
        with `max_claims_age`, where the cached one was received longer ago.

        Raises:
            TokenRefused: the issuer's token fails verification or enforcement.
            CredentialsRejected, RequestRejected: no request is made before `.retry_after` seconds
                have passed, or the org has other credentials.
            Throttled, Unavailable: no token, or no verdict on it, yet; see `.retry_after`.
        """
        raise NotImplementedError

    def drop(self, org_id: OrgId) -> None:
        """Forget all of an org: its tokens, its credentials, its parking."""
        raise NotImplementedError

    async def close(self) -> None:
        """End every refresh that is under way."""
        raise NotImplementedError
