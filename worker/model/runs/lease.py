"""Lease: until when a worker incarnation owns its runs, and when they must freeze. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

# The fraction of an unrenewed lease after which the zygote freezes the runs.
FREEZE_AT = 0.8


@dataclass(frozen=True, slots=True)
class Lease:
    """Valid for `duration` from `renewed_at`, when its last renewal was sent. Times are monotonic seconds.

    Since `contact_since` every renewal succeeded in time; None if the last one failed.
    """

    duration: timedelta
    renewed_at: float
    contact_since: float | None

    @classmethod
    def begun(cls, duration: timedelta, at: float) -> Lease:
        """The lease of a newly registered worker."""
        return cls(duration, at, at)

    @property
    def expires_at(self) -> float:
        """From then on other workers may take over the runs."""
        return self.renewed_at + self.duration.total_seconds()

    @property
    def freeze_at(self) -> float:
        """From then on the runs are frozen until a renewal confirms them."""
        return self.renewed_at + FREEZE_AT * self.duration.total_seconds()

    def renewed(self, asked_at: float, answered_at: float) -> Lease:
        """The lease after a successful renewal. It counts from `asked_at`: the database renewed it later.

        Contact that was broken, or silent for longer than the lease, restarts at `answered_at`.
        """
        unbroken = self.contact_since is not None and asked_at < self.expires_at
        return replace(
            self, renewed_at=asked_at, contact_since=self.contact_since if unbroken else answered_at
        )

    def missed(self) -> Lease:
        """The lease after a failed renewal: contact is broken, the expiry stays."""
        return replace(self, contact_since=None)

    def unbroken_contact(self, at: float) -> float:
        """Seconds for which every renewal succeeded in time; 0 after the lease has expired.

        So a suspended worker notices broken contact even before its next renewal.
        """
        if self.contact_since is None or at >= self.expires_at:
            return 0.0
        return at - self.contact_since

    def may_recover(self, at: float) -> bool:
        """Whether contact has lasted a whole lease, so that live owners have renewed before."""
        return self.unbroken_contact(at) >= self.duration.total_seconds()
