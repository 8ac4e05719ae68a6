"""Results: what a handler may return besides a value, and the hint for what the sandbox denied."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from worker.definitions.units import LONGEST, parse_duration

Duration = timedelta | float | str


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after a while (default: the definition's backoff); counts against `max_attempts`.

    `after` is a timedelta, seconds, or text such as `5m`.
    """

    after: Duration | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Snooze:
    """Call me again after a while; counts as nothing. `after` as in `Retry`."""

    after: Duration
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the run as cancelled, with the reason shown to people."""

    reason: str


@dataclass(frozen=True, slots=True)
class HandBack:
    """Let the run wait for another worker, after saving: the answer to a drain. Counts as nothing."""


class PermanentError(Exception):
    """Raised by a handler: the run has failed, and another try would not help."""


def as_timedelta(duration: Duration) -> timedelta:
    """A duration as a handler may give it: a timedelta, seconds, or text such as `5m`.

    Raises:
        ValueError: it is negative, longer than a hundred years, or no duration.
    """
    if isinstance(duration, str):
        span = parse_duration(duration)
    elif isinstance(duration, timedelta):
        span = duration
    else:
        span = timedelta(seconds=duration)
    if span < timedelta(0):
        raise ValueError(f"{duration!r} lies in the past")
    if span > LONGEST:
        raise ValueError(f"{duration!r} is longer than a hundred years")
    return span
