"""Vitals: what a worker knows of its own state at this moment; health checks and metrics read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vitals:
    """Questions to the parts of one worker incarnation; all answer at once, without the database.

    `ages` gives, by loop, the seconds since it last came round, `stalled` those that do
    not tick; `lease_remaining` is in seconds, 0 or less once it has passed; `slots`
    and `used` are runs by isolation.
    """

    ages: Callable[[], Mapping[str, float]]
    stalled: Callable[[], list[str]]
    lease_remaining: Callable[[], float]
    admitting: Callable[[], bool]
    draining: Callable[[], bool]
    slots: Mapping[str, int]
    used: Callable[[str], int]

    def in_words(self) -> str:
        """One line for whoever looks at the process: what is amiss, what runs, how long the lease holds."""
        left = self.lease_remaining()
        taken = {name: f"{self.used(name)} of {count} {name}" for name, count in self.slots.items() if count}
        return "; ".join(
            [
                *(["draining"] if self.draining() else []),
                *(f"the loop {name} stands still" for name in self.stalled()),
                *([] if self.admitting() or self.draining() else ["nothing admitted"]),
                f"runs: {', '.join(taken.values()) or 'no slots'}",
                f"lease: {left:.0f} s" if left > 0 else "lease lost",
            ]
        )
