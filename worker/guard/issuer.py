"""Issuer: one `[issuers.NAME]` of worker.toml, or what a guard is made for, and its provider's profile."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigurationError
from .profile import Profile
from .urls import fault_of_url


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer of tokens (RFC 8414, section 2), as the operator configured it.

    `url` is its base URL. `audience` is the default for definitions without one.
    `token_endpoint` and `keys_url` override the profile and the discovery document. Raises
    ConfigurationError for an invalid rate, or a URL that is not https (http for loopback only).
    """

    name: str
    profile: Profile
    url: str
    audience: str | None = None
    api_origins: tuple[str, ...] = ()
    max_requests_per_second: float = 10.0
    token_endpoint: str = ""
    keys_url: str = ""

    def __post_init__(self) -> None:
        fix = f"correct it in [issuers.{self.name}] of worker.toml"
        # No URL is shown: a malformed one may contain a password.
        for key in ("url", "token_endpoint", "keys_url"):
            if (url := getattr(self, key)) and (fault := fault_of_url(url)):
                raise ConfigurationError(f"issuer {self.name}: {key} {fault}", fix=fix)
        if not 0 < self.max_requests_per_second <= 10_000:
            raise ConfigurationError(
                f"issuer {self.name}: max_requests_per_second must be above 0 and at most 10000", fix=fix
            )

    @property
    def base(self) -> str:
        """The URL without a trailing slash; the profile's paths are appended to it."""
        return self.url.rstrip("/")

    @property
    def iss(self) -> str:
        """The issuer identifier, compared with `iss` byte for byte (RFC 9207, RFC 8414)."""
        return self.base + self.profile.issuer_suffix
