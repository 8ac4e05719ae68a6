"""Clocks, and times as text."""

from __future__ import annotations

from datetime import UTC, datetime

from worker.guard.clock import Clock, SystemClock

__all__ = ["Clock", "SystemClock", "from_text", "to_text"]

# Formatting a time takes twice as long as looking up the text of its second.
SECONDS_KEPT = 4096
_seconds: dict[tuple[int, int], str] = {}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_text(instant: datetime) -> str:
    """RFC 3339 in UTC with microseconds and `Z`: 27 characters that sort as text."""
    since = instant - EPOCH
    second = since.days, since.seconds
    text = _seconds.get(second)
    if text is None:
        if len(_seconds) >= SECONDS_KEPT:
            _seconds.clear()
        text = _seconds[second] = f"{instant.astimezone(UTC).isoformat()[:19]}."
    return f"{text}{instant.microsecond:06d}Z"


def from_text(text: str) -> datetime:
    """Parse RFC 3339 with an offset or `Z`; returns UTC.

    Raises:
        ValueError: the text is not RFC 3339, or has no offset.
    """
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} has no offset; write it with Z, such as 2027-01-01T08:00:00Z")
    return instant if instant.tzinfo is UTC else instant.astimezone(UTC)
