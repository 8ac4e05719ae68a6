"""The issuers of worker.toml, each with its provider's profile."""

from __future__ import annotations

from worker.providers import profile
from worker.settings import Settings
from worker.tokens.issuer import Issuer


def issuers_of(settings: Settings) -> dict[str, Issuer]:
    """Issuers by their name in `worker.toml`.

    Raises:
        ConfigurationError: an unknown profile, or a URL that a secret must not be sent to.
    """
    return {
        name: Issuer(
            name=name,
            profile=profile.load(issuer.profile),
            url=issuer.url,
            audience=issuer.audience or None,
            api_origins=issuer.api_origins,
            max_requests_per_second=issuer.max_requests_per_second,
            token_endpoint=issuer.token_endpoint,
            keys_url=issuer.keys_url,
        )
        for name, issuer in settings.issuers.items()
    }
