"""Issuer client: every request to one issuer, within its rate and behind its breaker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from worker.clock import Clock
from worker.errors import IssuerUnavailable
from worker.telemetry.masking import masker
from worker.tokens.breaker import Breaker, Budget, IssuerPaused
from worker.tokens.credentials import Credential
from worker.tokens.endpoints import Endpoints, open_key_set
from worker.tokens.grant import GrantedToken, request_token
from worker.tokens.issuer import Issuer
from worker.tokens.verify import verify

# Full jitter: anywhere between 0 and these, doubling.
RETRY_FIRST, RETRY_LAST = 0.5, 4.0


class IssuerClient:
    """One issuer's endpoints, keys, budget and breaker."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self.issuer = issuer
        self._client = client
        self._clock = clock
        self._endpoints = Endpoints(issuer, client, clock=clock)
        self._keys = open_key_set(issuer, self._endpoints, clock=clock)
        self._budget = Budget(issuer, clock=clock)
        self._breaker = Breaker(issuer.name, clock=clock)

    @property
    def is_free(self) -> bool:
        """Whether a request that can wait may be sent now: no pause is on, and the breaker is closed."""
        return not (self._budget.is_paused or self._breaker.is_open)

    async def grant(
        self, credential: Credential, *, audience: str, scopes: frozenset[str], tries: int
    ) -> GrantedToken:
        """Ask for a token, up to so many times while the issuer fails for this org alone.

        Raises as `request_token` does, and:

            IssuerPaused: nothing was sent; the breaker is open, and it is not this org's turn.
        """
        masker.register(credential.secret.reveal())
        retrying = AsyncRetrying(
            sleep=self._clock.sleep,
            stop=stop_after_attempt(tries),
            wait=wait_random_exponential(multiplier=RETRY_FIRST, max=RETRY_LAST),
            retry=retry_if_exception(
                lambda error: _may_pass(error) and self._breaker.fails_alone(credential.org_code)
            ),
            reraise=True,
        )
        granted: GrantedToken = await retrying(self._request, credential, audience, scopes)
        masker.register(granted.text)
        return granted

    async def verify(self, text: str, audience: str) -> Mapping[str, Any]:
        """The payload of a token of this issuer; raises as `verify.verify` does."""
        return await verify(text, issuer=self.issuer, audience=audience, keys=self._keys, clock=self._clock)

    async def close(self) -> None:
        """End what is under way beside the requests."""
        await self._keys.close()
        await self._endpoints.close()

    async def _request(self, credential: Credential, audience: str, scopes: frozenset[str]) -> GrantedToken:
        org = credential.org_code
        doubtful = self._breaker.doubts(org)
        # The breaker first: a turn of the budget that it then refused would be lost.
        with self._breaker.watch(org):
            async with self._budget.request(org, doubtful=doubtful):
                return await request_token(
                    self._client,
                    self.issuer,
                    credential,
                    endpoint=await self._endpoints.token(),
                    audience=audience,
                    scopes=scopes,
                    clock=self._clock,
                )


def _may_pass(error: BaseException) -> bool:
    """Whether another try at once may help: the issuer failed and did not say for how long."""
    if isinstance(error, IssuerPaused) or not isinstance(error, IssuerUnavailable):
        return False
    return (error.retry_after or 0.0) <= 1.0
