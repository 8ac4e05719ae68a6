"""How missed instants, overlaps and failures are judged: frozen values and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

Overlap = Literal["skip", "queue_one", "replace", "allow"]
MisfireMode = Literal["once", "skip", "all"]

OVERLAPS: tuple[Overlap, ...] = ("skip", "queue_one", "replace", "allow")
MISFIRE_MODES: tuple[MisfireMode, ...] = ("once", "skip", "all")

MISFIRE_GRACE = timedelta(seconds=60)
MISFIRE_LIMIT = 100
# The least that `misfire_within` and `start_deadline` are by default, however short the period.
LEAST_PATIENCE = timedelta(hours=1)

TIMEOUT = timedelta(hours=1)
CANCEL_GRACE = timedelta(seconds=10)
MAX_ATTEMPTS = 3
RETRY_BACKOFF = timedelta(seconds=10)
RETRY_BACKOFF_MAX = timedelta(hours=1)
MAX_RECOVERIES = 3


@dataclass(frozen=True, slots=True)
class MisfirePolicy:
    """What becomes of an instant first seen more than `grace` late.

    `once` runs the newest missed one unless one on time stands for it, `skip` none,
    `all` the newest `limit`; none is older than `within` (None: the schedule's
    period there, at least an hour).
    """

    mode: MisfireMode = "once"
    grace: timedelta = MISFIRE_GRACE
    within: timedelta | None = None
    limit: int = MISFIRE_LIMIT


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a run is tried and how long it waits between: exponential, with full jitter."""

    max_attempts: int = MAX_ATTEMPTS
    backoff: timedelta = RETRY_BACKOFF
    backoff_max: timedelta = RETRY_BACKOFF_MAX
    max_recoveries: int = MAX_RECOVERIES
