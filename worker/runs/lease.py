"""Lease: a worker incarnation's right to its runs until an instant, and when its runs must freeze. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

# The share of an unrenewed lease after which the zygote freezes the runs.
FREEZE_AT = 0.8


@dataclass(frozen=True, slots=True)
class Lease:
    """Held for `duration` from the monotonic second `renewed_at`, when its last renewal was asked for.

    `contact_since` is the monotonic second since which every renewal came through in time.
    """

    duration: timedelta
    renewed_at: float
    contact_since: float

    @classmethod
    def begun(cls, duration: timedelta, at: float) -> Lease:
        """The lease of a worker that has just registered."""
        return cls(duration, at, at)

    @property
    def expires_at(self) -> float:
        """The monotonic second at which others may take the runs."""
        return self.renewed_at + self.duration.total_seconds()

    @property
    def freeze_at(self) -> float:
        """The monotonic second at which the runs stop until a renewal says they are still ours."""
        return self.renewed_at + FREEZE_AT * self.duration.total_seconds()

    def renewed(self, asked_at: float) -> Lease:
        """The lease after a renewal that was asked for at `asked_at` and came through.

        It counts from the asking: the database cannot have extended it earlier.
        """
        since = self.contact_since if asked_at < self.expires_at else asked_at
        return replace(self, renewed_at=asked_at, contact_since=since)

    def may_recover(self, at: float) -> bool:
        """Whether contact has held for a whole lease, so that live owners have renewed first."""
        return at < self.expires_at and at - self.contact_since >= self.duration.total_seconds()
