"""The management API of a configured issuer, for the commands that provision orgs. Workers never open it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import Clock
from worker.errors import ConfigurationError, NotFound
from worker.features.provisioning.management.calls import Calls, Permit
from worker.features.provisioning.management.contract import Management
from worker.features.provisioning.management.kinde import KindeManagement
from worker.features.provisioning.management_token import ManagementToken
from worker.guard.urls import fault_of_url
from worker.outbound import open_client
from worker.secret import Secret
from worker.settings import Settings
from worker.telemetry.masking import shown_url
from worker.tokens.issuer_client import IssuerClient
from worker.wiring.issuers import issuers_of, read_secret

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
