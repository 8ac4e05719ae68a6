"""Origins of URLs (RFC 6454), and which URLs may carry a secret. Pure."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """What must be equal for two URLs to have the same origin (RFC 6454, section 4)."""

    scheme: str
    host: str
    port: int


def origin_of(url: str) -> Origin:
    """The origin of a URL; raises ValueError if the URL is malformed."""
    parts = urlsplit(url)
    return Origin(parts.scheme, parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme, 0))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by name: localhost, 127.0.0.0/8 or ::1."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fault_of_url(url: str) -> str | None:
    """Why a secret must not be sent to this URL, or None: https, or http to a loopback address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if not host or port == 0 or parts.scheme not in DEFAULT_PORTS:
        return "is not an https URL"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "must have no user, query or fragment"
    if parts.scheme == "http" and not is_loopback(host):
        return "must be https; http is for loopback addresses only"
    return None
