"""What a seed's plan is made of: definitions, and actions, which people do or faults are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

# Seconds from which no fault begins any more, and at which the schedules end.
LAST_FAULT, END = 220.0, 286.0
KEYS = """\
spread = "off"
max_attempts = 100
max_recoveries = 100
retry_backoff = "1s"
retry_backoff_max = "4s"
"""
# How long something stands still, in leases.
LENGTHS = (0.2, 0.5, 0.9, 1.1, 1.5, 2.5)
ALL = 'overlap = "allow"\nmisfire = "all"\n'


@dataclass(frozen=True)
class Entry:
    """A definition; `period` is in seconds, `ends` are the states in which its runs may end."""

    org: int
    name: str
    handler: str
    period: float
    ends: tuple[str, ...] = ("succeeded",)
    keys: str = ALL
    schedule: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    pool: str = ""
    # Seconds in which its scheduled times must be done; 0 for no deadline.
    done_within: float = 0
    # Runs of one scheduled time, with those below it.
    size: int = 1

    def toml(self, *, enabled: bool, extra: str = "") -> str:
        schedule = self.schedule or f"every {self.period:g}s"
        params = ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.params.items())
        pool = f'pool = "{self.pool}"\n' if self.pool else ""
        within = f'done_within = "{self.done_within:g}s"\n' if self.done_within else ""
        return (
            f'[[definition]]\norg = "org_{self.org}"\nname = "{self.name}"\nhandler = "{self.handler}"\n'
            f'schedule = "{schedule}"\nenabled = {str(enabled).lower()}\nparams = {{ {params} }}\n'
            f"{KEYS}{self.keys}{pool}{within}{extra}"
        )


@dataclass(frozen=True)
class Action:
    """Something that happens at a time: what a person does, or a fault."""

    at: float
    kind: str
    target: str = ""
    # How long it lasts, in seconds, or how large it is.
    size: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        lasting = f" {self.size:.2f}" if self.size else ""
        return f"{self.at:7.2f} {self.kind} {self.target}{lasting} {self.where}".rstrip()
