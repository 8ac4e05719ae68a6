"""The management API of a configured issuer, for the commands that provision orgs. Workers never open it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import Clock
from worker.errors import (
    AnswerTooLarge,
    ConfigurationError,
    CredentialsRejected,
    NotFound,
    RequestRejected,
)
from worker.features.provisioning.management.calls import Calls, Permit
from worker.features.provisioning.management.contract import Management
from worker.features.provisioning.management.kinde import KindeManagement
from worker.guard.http import TOO_LARGE, what_failed
from worker.guard.urls import fault_of_url
from worker.ids import OrgId
from worker.outbound import open_client
from worker.secret import Secret
from worker.settings import Settings
from worker.telemetry.masking import masker, shown_url
from worker.tokens.credentials import Credential
from worker.tokens.issuer_client import IssuerClient
from worker.wiring.issuers import issuers_of, read_secret

# Tries for the access token of the management credentials.
TRIES = 4
# All in seconds: a token without expires_in is used this long; a new one is requested this long before
# the end, at most a tenth of the lifetime; a rejected one that is younger is not replaced.
LIFETIME = 300.0
EARLY = 60.0
BRAND_NEW = 30.0
# By the name of the provider's profile.
ADAPTERS = {"kinde": KindeManagement}


@asynccontextmanager
async def open_management(
    settings: Settings, issuer: str, clock: Clock, *, permit: Permit
) -> AsyncIterator[Management]:
    """The management API of an issuer, which asks `permit` before each change; reads its secret.

    Raises:
        NotFound: worker.toml has no such issuer.
        ConfigurationError: it has no management table or no secret, or no adapter fits its profile.
    """
    configured = issuers_of(settings).get(issuer)
    if configured is None:
        known = ", ".join(sorted(settings.issuers)) or "none"
        raise NotFound(f"there is no issuer {issuer!r}", fix=f"worker.toml has {known}")
    chosen = settings.issuers[issuer].management
    if not chosen.client_id:
        raise ConfigurationError(
            f"issuer {issuer} has no management API",
            fix=f"add [issuers.{issuer}.management] to worker.toml; the documentation's page Kinde shows how",
        )
    adapter = ADAPTERS.get(configured.profile.name)
    if adapter is None:
        raise ConfigurationError(
            f"issuer {issuer}: there is no management adapter for {configured.profile.title}",
            fix="add its orgs and credentials with `orgs import` and `credentials add`; "
            "the documentation's page Write a management adapter says how to write an adapter",
        )
    secret = management_secret(issuer, settings.secrets_dir)
    origin = (chosen.url or configured.base).rstrip("/")
    if fault := fault_of_url(origin):
        raise ConfigurationError(
            f"issuer {issuer}: management.url {shown_url(origin)} {fault}",
            fix=f"correct it in [issuers.{issuer}.management] of worker.toml",
        )
    async with open_client() as client:
        tokens = IssuerClient(configured, client, clock=clock)
        bearer = ManagementToken(
            tokens,
            client_id=chosen.client_id,
            secret=secret,
            audience=chosen.audience or f"{origin}/api",
            clock=clock,
        )
        calls = Calls(
            issuer,
            origin,
            client,
            bearer,
            permit=permit,
            clock=clock,
            per_second=chosen.max_requests_per_second or configured.max_requests_per_second,
            connections=settings.provisioning.concurrency,
            reset_headers=configured.profile.reset_headers,
        )
        try:
            yield adapter(calls, tokens.verify_message, clock=clock)
        finally:
            await tokens.close()


def management_secret(issuer: str, secrets_dir: str) -> Secret:
    """The secret of the management credentials of an issuer: the file `management__NAME` in `secrets_dir`.

    Raises ConfigurationError if it cannot be read.
    """
    name = f"management__{issuer}"
    fix = f"put the application's secret into the file {name} in secrets_dir, readable by this user only"
    if not secrets_dir:
        raise ConfigurationError(
            f"issuer {issuer}: its management API needs a secret, and secrets_dir is not set", fix=fix
        )
    return Secret(read_secret(name, secrets_dir, "", fix))


class ManagementToken:
    """The access token, requested again once it is rejected. Satisfies `management.calls.Bearer`."""

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
