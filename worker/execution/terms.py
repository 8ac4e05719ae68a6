"""Terms: what an attempt may take, of the definition, else of its handler, else by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from worker.definitions.definition import Definition
from worker.definitions.policies import CANCEL_GRACE, TIMEOUT, RetryPolicy
from worker.definitions.units import parse_duration, parse_memory
from worker.handlers.catalogue import HandlerEntry


@dataclass(frozen=True, slots=True)
class Terms:
    """Limits of one attempt; `memory` is in bytes, `scopes` are those that its token must have."""

    timeout: timedelta = TIMEOUT
    cancel_grace: timedelta = CANCEL_GRACE
    memory: int | None = None
    scopes: frozenset[str] = frozenset()
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def of(cls, definition: Definition, entry: HandlerEntry | None) -> Self:
        """The terms of a definition whose handler is offered as `entry`, or is not offered here."""
        timeout = memory = attempts = None
        scopes: frozenset[str] = frozenset()
        if entry is not None:
            timeout = parse_duration(entry.timeout) if entry.timeout else None
            memory = parse_memory(entry.memory) if entry.memory else None
            attempts, scopes = entry.max_attempts, frozenset(entry.scopes)
        return cls(
            timeout=definition.timeout_or(timeout),
            cancel_grace=definition.cancel_grace,
            memory=definition.memory or memory,
            scopes=scopes if definition.scopes is None else definition.scopes,
            retry=definition.retry_policy(attempts),
        )


# Of an attempt that came to know no definition: one for all, since it never changes.
UNKNOWN = Terms()
