"""Channel: all that is asked of one issuer passes here, within its budget and behind its breaker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from worker.clock import Clock
from worker.errors import IssuerUnavailable, Throttled
from worker.telemetry.masking import masker
from worker.tokens.breaker import Breaker, IssuerPaused
from worker.tokens.budget import Budget, BudgetPaused
from worker.tokens.credentials import Credential
from worker.tokens.endpoints import Endpoints, open_key_set
from worker.tokens.grant import GrantedToken, request_token
from worker.tokens.issuer import Issuer
from worker.tokens.verify import verify

# Full jitter: anywhere between 0 and these, doubling.
RETRY_FIRST, RETRY_LAST = 0.5, 4.0


class Channel:
    """One issuer's endpoints, keys, budget and breaker."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self.issuer = issuer
        self._client = client
        self._clock = clock
        self._endpoints = Endpoints(issuer, client, clock=clock)
        self._keys = open_key_set(issuer, self._endpoints, clock=clock)
        self._budget = Budget(issuer, clock=clock)
        self._breaker = Breaker(issuer.name, clock=clock)

    def check(self) -> None:
        """Raise BudgetPaused or IssuerPaused where a request would not be sent now."""
        self._budget.check()
        self._breaker.check()

    async def grant(
        self, credential: Credential, *, audience: str, scopes: frozenset[str], tries: int
    ) -> GrantedToken:
        """Ask for a token, up to so many times while the issuer fails; raises as `request_token` does.

        Raises:
            IssuerPaused: nothing was sent, since the breaker is open.
        """
        masker.register(credential.secret.reveal())
        retrying = AsyncRetrying(
            sleep=self._clock.sleep,
            stop=stop_after_attempt(tries),
            wait=wait_random_exponential(multiplier=RETRY_FIRST, max=RETRY_LAST),
            retry=retry_if_exception(_may_pass),
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

    async def _request(self, credential: Credential, audience: str, scopes: frozenset[str]) -> GrantedToken:
        self._breaker.check()
        try:
            async with self._budget.request():
                with self._breaker.watch(credential.org_code):
                    granted = await request_token(
                        self._client,
                        self.issuer,
                        credential,
                        endpoint=await self._endpoints.token(),
                        audience=audience,
                        scopes=scopes,
                        clock=self._clock,
                    )
        except BudgetPaused:
            raise
        except Throttled as throttled:
            throttled.retry_after = self._budget.pause(throttled.retry_after or 0.0)
            raise
        self._budget.answered()
        return granted


def _may_pass(error: BaseException) -> bool:
    """Whether another try at once may help: the issuer failed and did not say for how long."""
    if isinstance(error, IssuerPaused) or not isinstance(error, IssuerUnavailable):
        return False
    return (error.retry_after or 0.0) <= 1.0
