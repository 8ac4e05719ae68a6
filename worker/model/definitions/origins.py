"""Origins (RFC 6454): where an org's token may go, and which of them would carry it unencrypted. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from worker.errors import DefinitionError
from worker.guard.urls import Origin, is_loopback, origin_of
from worker.telemetry.masking import shown_url


def parse_origin(text: str) -> Origin:
    """The origin in a text such as `https://api.acme.com`; raises ValueError for anything more or less."""
    # A bare host has no password; any other malformed text may contain one.
    shown = text if re.fullmatch(r"[\w.-]+(?::\d{1,5})?", text) else shown_url(text)
    if (origin := _read(text, r"https?://[^\s/?#@\\]+/?")) is None:
        raise ValueError(f"{shown!r} is not an origin; write scheme, host and port: https://api.acme.com")
    return origin


def parse_base_url(text: str) -> str:
    """A URL that paths are joined to, without user, query or fragment; raises ValueError."""
    if _read(text, r"https?://[^\s?#@\\]+") is None:
        example = "https://api.acme.com or https://api.acme.com/v1"
        raise ValueError(f"{shown_url(text)!r} is not a base URL; write {example}")
    return text


def _read(text: str, pattern: str) -> Origin | None:
    """The origin of a URL in this form, or None."""
    with suppress(ValueError):
        if re.fullmatch(pattern, text, re.IGNORECASE) and urlsplit(text).port != 0:
            return origin if (origin := origin_of(text)).host else None
    return None


# The `api_origins` of each issuer in worker.toml.
IssuerOrigins = Mapping[str, Sequence[str]]
NO_ISSUERS: IssuerOrigins = {}


def check_origins(
    own: Sequence[str] | None,
    base_url: str | None,
    issuers: Iterable[str],
    configured: IssuerOrigins,
    insecure: Iterable[str],
    *,
    entry: str,
) -> None:
    """Check a definition's `api_origins`, and its `api_base_url` with those of each issuer if it has none.

    Raises:
        DefinitionError: an origin is unencrypted and not among the `insecure`, or no token goes to the URL.
    """
    check_encrypted(own, insecure, entry=entry)
    for origins in (configured.get(name) for name in issuers) if own is None else (own,):
        if origins is not None:
            check_base_url(base_url, origins, entry=entry)


def check_base_url(base_url: str | None, origins: Iterable[str], *, entry: str) -> None:
    """Raise DefinitionError for an `api_base_url` to which no token goes."""
    if base_url is not None and not is_listed(base_url, origins):
        raise DefinitionError(
            f"{entry}, api_base_url: its origin is not in api_origins, so no token would go there",
            entry=entry,
            field="api_base_url",
            fix="add its origin to api_origins of the definition or of its issuer, or correct it",
        )


def is_listed(url: str, origins: Iterable[str]) -> bool:
    """Whether a valid URL has one of these origins."""
    return origin_of(url) in set(map(parse_origin, origins))


def unencrypted(origins: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The origins that would carry a token unencrypted off this machine, except those `allowed`."""
    exempt = {parse_origin(origin) for origin in allowed}
    return [
        text
        for text in origins
        if (origin := parse_origin(text)).scheme == "http"
        and not is_loopback(origin.host)
        and origin not in exempt
    ]


def check_encrypted(origins: Iterable[str] | None, allowed: Iterable[str], *, entry: str) -> None:
    """Raise DefinitionError for the first of a definition's `api_origins` that is unencrypted."""
    for origin in unencrypted(origins or (), allowed):
        raise DefinitionError(
            f"{entry}, api_origins: {origin} would carry the org's token unencrypted",
            entry=entry,
            field="api_origins",
            fix=f'write https://; to accept it, add "{origin}" to [execution] insecure_origins',
        )
