"""Issuer: one `[issuers.NAME]` of worker.toml, with the profile of its provider."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from worker.definitions.origins import DEFAULT_PORTS, is_loopback
from worker.errors import ConfigurationError
from worker.providers.profile import Profile
from worker.telemetry.masking import shown_url


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer of tokens (RFC 8414, section 2), as the operator configured it.

    `url` is its base, `iss` the issuer identifier that its tokens carry. `audience`
    is asked for where a definition names none. `token_endpoint` and `keys_url`, where
    given, replace what the profile or the discovery document says.

    Raises:
        ConfigurationError: a URL is not https (http for loopback addresses only), or the rate is not above 0.
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
        for url in (self.url, self.token_endpoint, self.keys_url):
            if url and (fault := fault_of(url)):
                raise ConfigurationError(
                    f"issuer {self.name}: {shown_url(url)} {fault}",
                    fix=f"correct it in [issuers.{self.name}] of worker.toml",
                )
        if not 0 < self.max_requests_per_second <= 10_000:
            raise ConfigurationError(
                f"issuer {self.name}: max_requests_per_second must be above 0 and at most 10000",
                fix=f"correct it in [issuers.{self.name}] of worker.toml",
            )

    @property
    def base(self) -> str:
        """The URL without a slash at its end; the profile's paths follow it."""
        return self.url.rstrip("/")

    @property
    def iss(self) -> str:
        """The issuer identifier, compared with `iss` byte for byte (RFC 9207, RFC 8414)."""
        return self.base + self.profile.issuer_suffix


def fault_of(url: str) -> str | None:
    """Why a secret must not be sent to this URL, or None: https, or http to a loopback address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is no URL"
    if not host or port == 0 or parts.scheme not in DEFAULT_PORTS:
        return "is no https URL"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "must have no user, query or fragment"
    if parts.scheme == "http" and not is_loopback(host):
        return "must be https; http is for loopback addresses only"
    return None


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL (RFC 6454, section 4)."""
    parts: SplitResult = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
