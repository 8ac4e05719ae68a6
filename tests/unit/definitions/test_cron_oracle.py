"""Crontab lines against the brute-force oracle, over the nights on which clocks change."""

from __future__ import annotations

import os
from datetime import timedelta
from random import Random
from zoneinfo import ZoneInfo

from tests.fakes import cron_oracle
from worker.definitions.triggers import parse_schedule

# ORACLE_CASES=10000 is the long form; the seed of a failure stands in its message.
CASES = int(os.environ.get("ORACLE_CASES", "200"))
SEED = int(os.environ.get("ORACLE_SEED", "2026"))
ZONES = {
    "Europe/Berlin": (2025, 2027),
    "America/New_York": (2025, 2027),
    "Australia/Lord_Howe": (2025, 2027),
    "Pacific/Chatham": (2025, 2027),
    "Africa/Cairo": (2024, 2026),
    "America/Nuuk": (2023, 2025),
    # Samoa left out 30 December 2011, and gave up its summer time in 2021.
    "Pacific/Apia": (2011, 2012),
}
BEFORE, AFTER = timedelta(hours=30), timedelta(hours=54)


def test_random_crontab_lines_fire_as_the_oracle_says_around_every_change_of_the_clock():
    """Instants, counts and the newest instant agree with walking every minute of the wall clock."""
    random = Random(SEED)
    fired = 0
    for case in range(CASES):
        zone = random.choice(list(ZONES))
        change = random.choice(cron_oracle.changes(zone, *ZONES[zone]))
        start, end = change - BEFORE, change + AFTER
        cron = cron_oracle.random_cron(random)
        expected = cron_oracle.instants(cron, zone, start, end)
        until = end - timedelta(microseconds=1)
        what = f"case {case} of seed {SEED}: {cron.text!r} in {zone} around {change}"

        trigger = parse_schedule(cron.text, ZoneInfo(zone)) if _can_fire(cron) else None
        if trigger is None:
            assert not expected, what
            continue
        assert list(trigger.between(start, until)) == expected, what
        assert trigger.count(start, until) == len(expected), what
        assert trigger.last(start, until) == (expected[-1] if expected else None), what

        # From and to anywhere within, also between whole minutes.
        low = start + (end - start) * random.random()
        high = low + (end - low) * random.random()
        inner = [instant for instant in expected if low <= instant <= high]
        assert trigger.count(low, high) == len(inner), what
        assert trigger.last(low, high) == (inner[-1] if inner else None), what
        later = [instant for instant in expected if instant > low]
        if later:
            assert trigger.after(low) == later[0], what
        fired += len(expected)
    assert fired > CASES


def _can_fire(cron: cron_oracle.Cron) -> bool:
    """Whether any day of a leap year after another allows the line; all else is refused."""
    return not cron.both_days or min(cron.days) <= max(
        (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1] for month in cron.months
    )
