"""Results: what a handler may return besides a value."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from worker.model.definitions.units import LONGEST, parse_duration

Duration = timedelta | float | str


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after a while (default: the definition's backoff); counts against `max_attempts`.

    `after` is a timedelta, seconds, or text such as `5m`, at most a hundred years.
    """

    after: Duration | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Snooze:
    """Run again after a while, without counting against `max_attempts`. `after` as in `Retry`."""

    after: Duration
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the run as cancelled; the reason is shown to people."""

    reason: str


@dataclass(frozen=True, slots=True)
class HandBack:
    """Let the run wait for another worker, after a drain. Does not count against `max_attempts`.

    Without a drain the attempt has failed.
    """


class PermanentError(Exception):
    """Raised by a handler: the run has failed, and a retry would not help."""


class EgressDenied(PermanentError):
    """The origin of a request is not in the run's egress list; nothing was sent and no name resolved."""


class RateLimited(Exception):
    """A request was not sent: a limit of the service, or a pause that it asked for, lasts too long.

    `retry_after` is in seconds, as `Snooze` takes it. If a handler lets it escape, the run waits that long
    and begins again; this does not count against `max_attempts`.
    """

    def __init__(self, retry_after: float, origin: str = "") -> None:
        super().__init__(
            f"the limit of requests to {origin or 'the service'} allows one in {retry_after:.1f} s"
        )
        self.retry_after = retry_after
        self.origin = origin


def limited_by(error: BaseException | None) -> RateLimited | None:
    """The `RateLimited` that an error is or was raised from, as client libraries do; None for any other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, RateLimited):
            return error
        seen.add(id(error))
        error = error.__cause__
    return None


def as_timedelta(duration: Duration) -> timedelta:
    """Convert a timedelta, seconds, or text such as `5m`; raises ValueError."""
    if isinstance(duration, str):
        span = parse_duration(duration)
    elif isinstance(duration, timedelta):
        span = duration
    else:
        span = timedelta(seconds=duration)
    if span < timedelta(0):
        raise ValueError(f"{duration!r} is negative")
    if span > LONGEST:
        raise ValueError(f"{duration!r} is longer than a hundred years")
    return span
