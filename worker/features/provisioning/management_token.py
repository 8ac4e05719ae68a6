"""The access token of the management credentials: cached, and requested again once it is rejected."""

from __future__ import annotations

import asyncio

from worker.clock import Clock
from worker.errors import AnswerTooLarge, ConfigurationError, CredentialsRejected, RequestRejected
from worker.guard.http import TOO_LARGE, what_failed
from worker.ids import OrgId
from worker.secret import Secret
from worker.telemetry.masking import masker
from worker.tokens.credentials import Credential
from worker.tokens.issuer_client import IssuerClient

TRIES = 4
# All in seconds: a token without expires_in is used this long; a new one is requested this long before
# the end, at most a tenth of the lifetime; a rejected one that is younger is not replaced.
LIFETIME = 300.0
EARLY = 60.0
BRAND_NEW = 30.0


class ManagementToken:
    """Satisfies `management.calls.Bearer`."""

    def __init__(
        self, client: IssuerClient, *, client_id: str, secret: Secret, audience: str, clock: Clock
    ) -> None:
        self._client = client
        self._credential = Credential("management", OrgId(""), "", 1, client_id, secret)
        self._audience = audience
        self._clock = clock
        self._requesting = asyncio.Lock()
        self._token: Secret | None = None
        self._received_at = self._renew_at = 0.0

    async def __call__(self, *, rejected: Secret | None = None) -> Secret:
        """The token.

        Raises:
            ConfigurationError: the issuer rejects the management credentials, or the audience for them.
            IssuerUnavailable: the issuer does not respond; nothing was sent to the management API.
            Throttled: it asks for fewer requests.
        """
        async with self._requesting:
            now = self._clock.monotonic()
            if rejected is not None and rejected == self._token and now - self._received_at >= BRAND_NEW:
                self._token = None
            if self._token is None or now >= self._renew_at:
                self._token = await self._request()
            return self._token

    async def _request(self) -> Secret:
        name = self._client.issuer.name
        try:
            granted = await self._client.grant(
                self._credential, audience=self._audience, scopes=frozenset(), tries=TRIES
            )
        except CredentialsRejected as error:
            raise ConfigurationError(
                f"issuer {name} rejects the management credentials: {error.detail}",
                fix=f"compare client_id in [issuers.{name}.management] and the secret management__{name} "
                "with the application at the provider",
            ) from None
        except AnswerTooLarge as error:
            raise ConfigurationError(
                f"issuer {name} gives no token for its management API: {what_failed(TOO_LARGE)}",
                fix=error.fix,
            ) from None
        except RequestRejected as error:
            raise ConfigurationError(
                f"issuer {name} gives no token for its management API: {error.detail}",
                fix=f"authorise the application for the API {self._audience} at the provider, or correct "
                f"audience in [issuers.{name}.management]",
            ) from None
        masker.register(granted.text)
        lifetime = granted.expires_in or LIFETIME
        self._received_at = granted.received_at
        self._renew_at = granted.received_at + lifetime - min(EARLY, lifetime / 10)
        return Secret(granted.text)
