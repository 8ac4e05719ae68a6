"""Spread: how long after its instant a definition fires, so that orgs do not all start at once."""

from __future__ import annotations

from datetime import timedelta
from hashlib import blake2b

from worker.definitions.definition import Spread
from worker.definitions.triggers import EveryTrigger, Trigger

# However long the period, a spread of its own accord delays by less than this.
WIDEST = timedelta(hours=1)
_NONE = timedelta(0)


def spread_of(
    org_code: str, name: str, schedule: str, trigger: Trigger, setting: Spread = "auto"
) -> timedelta:
    """The delay of a definition, the same on every machine and after every restart.

    `auto` spreads `every` and `@…` over their period, at most an hour, and leaves
    crontab lines and `at` alone; a duration spreads any schedule over that long.
    """
    window = window_of(schedule, trigger, setting)
    if not window:
        return _NONE
    digest = blake2b(f"{org_code}\0{name}".encode(), digest_size=8).digest()
    return timedelta(milliseconds=window // timedelta(milliseconds=1) * int.from_bytes(digest) >> 64)


def window_of(schedule: str, trigger: Trigger, setting: Spread = "auto") -> timedelta:
    """Over how long the orgs' delays are spread; zero where all fire at the instant itself."""
    if setting != "auto":
        return _NONE if setting == "off" else setting
    if isinstance(trigger, EveryTrigger):
        return min(trigger.interval, WIDEST)
    return WIDEST if schedule.strip().startswith("@") else _NONE
