"""Definitions, their schedules, and policies for missed scheduled times, overlap and failures. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

Overlap = Literal["skip", "queue_one", "replace", "allow"]
MisfireMode = Literal["once", "skip", "all"]

OVERLAPS: tuple[Overlap, ...] = ("skip", "queue_one", "replace", "allow")
MISFIRE_MODES: tuple[MisfireMode, ...] = ("once", "skip", "all")

# Schedules by name, and the crontab line of each.
NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

# The key with the dates of a definition's calendar: a stored spec has it, a file does not.
CALENDAR_DATES = "calendar_dates"

MISFIRE_GRACE = timedelta(seconds=60)
MISFIRE_LIMIT = 100
# The smallest default of `misfire_within` and `start_deadline`, however short the period.
LEAST_PATIENCE = timedelta(hours=1)

TIMEOUT = timedelta(hours=1)
CANCEL_GRACE = timedelta(seconds=10)
MAX_ATTEMPTS = 3
RETRY_BACKOFF = timedelta(seconds=10)
RETRY_BACKOFF_MAX = timedelta(hours=1)
MAX_RECOVERIES = 3


@dataclass(frozen=True, slots=True)
class MisfirePolicy:
    """Which missed scheduled times, those first seen more than `grace` late, still run.

    `once` runs the newest unless a later one is on time, `skip` none, `all` the newest
    `limit`; none is older than `within` (default: the schedule's period, at least an hour).
    """

    mode: MisfireMode = "once"
    grace: timedelta = MISFIRE_GRACE
    within: timedelta | None = None
    limit: int = MISFIRE_LIMIT


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a run is tried, with exponential backoff and full jitter between attempts."""

    max_attempts: int = MAX_ATTEMPTS
    backoff: timedelta = RETRY_BACKOFF
    backoff_max: timedelta = RETRY_BACKOFF_MAX
    max_recoveries: int = MAX_RECOVERIES
