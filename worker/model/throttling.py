"""Throttling: how long a response asks to wait. Pure, and without an HTTP client."""

from __future__ import annotations

import re
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Protocol

# The responses that ask for a pause, and the headers that say until when, besides Retry-After.
THROTTLED = (429, 503)
RESET_HEADERS = ("RateLimit-Reset", "X-RateLimit-Reset")
# An item of the header RateLimit: `"default";r=0;t=30` (draft-ietf-httpapi-ratelimit-headers).
_USED_UP = re.compile(r";\s*r=0\s*;\s*t=([0-9]{1,10})\b")


class Headers(Protocol):
    """The headers of a response, by name in any case."""

    def get(self, key: str, default: str = "", /) -> str: ...


def asked_pause(status: int, headers: Headers, now: float) -> float | None:
    """Seconds that a response asks its sender to pause, or None if it does not: 429 and 503 only.

    `now` is in seconds since 1970. What it asks is a claim of the service: give it a ceiling.
    """
    if status not in THROTTLED:
        return None
    asked = retry_delay(headers, RESET_HEADERS, now)
    if asked is None and (used_up := _USED_UP.findall(headers.get("RateLimit", "")[:1_000])):
        asked = max(map(float, used_up))
    return asked


def retry_delay(headers: Headers, reset_headers: tuple[str, ...], now: float) -> float | None:
    """Seconds that a response asks to wait, or None: Retry-After (RFC 9110, 10.2.3), else a reset header.

    `now` is in seconds since 1970. A reset header holds seconds from now or a Unix time.
    """
    text = headers.get("retry-after", "").strip()
    with suppress(ValueError, TypeError, OverflowError):
        seconds = _seconds(text)
        return max(parsedate_to_datetime(text).timestamp() - now if seconds is None else seconds, 0.0)
    for name in reset_headers:
        if (seconds := _seconds(headers.get(name, "").strip())) is not None:
            return _until(seconds, now)
    return None


def room_left(headers: Headers, reset_headers: tuple[str, ...], now: float) -> tuple[float | None, float]:
    """The share of the allowed requests that is left, or None if unknown, and the seconds until it is reset.

    From `RateLimit-Limit`, `RateLimit-Remaining` and `RateLimit-Reset`, or the names of a provider.
    """
    for name in reset_headers:
        limit, left, reset = (
            _seconds(headers.get(name.replace("Reset", part), "").strip())
            for part in ("Limit", "Remaining", "Reset")
        )
        if limit and left is not None and reset is not None:
            return left / limit, _until(reset, now)
    return None, 0.0


def _until(reset: float, now: float) -> float:
    return max(reset - now if reset > 1e9 else reset, 0.0)


def _seconds(text: str) -> float | None:
    whole, _, fraction = text.partition(".")
    if len(text) > 20 or not text.isascii() or not whole.isdigit() or not (fraction or "0").isdigit():
        return None
    return float(text)
