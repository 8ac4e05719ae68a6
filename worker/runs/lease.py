"""Lease: a worker incarnation's right to its runs until an instant, and when its runs must freeze. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

# The share of an unrenewed lease after which the zygote freezes the runs.
FREEZE_AT = 0.8


@dataclass(frozen=True, slots=True)
class Lease:
    """Held for `duration` from the monotonic second `renewed_at`, when its last renewal was asked for.

    `contact_since` is the monotonic second since which every renewal came through in
    time; None while the last one did not.
    """

    duration: timedelta
    renewed_at: float
    contact_since: float | None

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

    def renewed(self, asked_at: float, answered_at: float) -> Lease:
        """The lease after a renewal that came through.

        It counts from the asking, since the database cannot have extended it earlier.
        Contact that was broken, or outlasted by the lease, counts from the answer.
        """
        unbroken = self.contact_since is not None and asked_at < self.expires_at
        return replace(
            self, renewed_at=asked_at, contact_since=self.contact_since if unbroken else answered_at
        )

    def missed(self) -> Lease:
        """The lease after a renewal that did not come through: contact is broken, it lasts as before."""
        return replace(self, contact_since=None)

    def unbroken_contact(self, at: float) -> float:
        """Seconds since which every renewal has come through in time; 0 once the lease has passed.

        A worker that was stopped finds its contact broken before its next renewal does.
        """
        if self.contact_since is None or at >= self.expires_at:
            return 0.0
        return at - self.contact_since

    def may_recover(self, at: float) -> bool:
        """Whether contact has held for a whole lease, so that living owners have renewed first."""
        return self.unbroken_contact(at) >= self.duration.total_seconds()
