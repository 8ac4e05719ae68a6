"""Spread: the same everywhere, even over the orgs, and never wider than a period or an hour."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from worker.model.definitions.triggers import parse_schedule
from worker.model.definitions.zones import parse_zone
from worker.model.runs.fire import spread_of

HOUR = timedelta(hours=1)


def spread(org: str, name: str, schedule: str, setting: Any = "auto") -> timedelta:
    return spread_of(org, name, schedule, parse_schedule(schedule, parse_zone("UTC")), setting)


def test_ten_thousand_hourly_orgs_have_no_busy_second():
    """The busiest second stays below five times the mean."""
    slots = Counter(
        spread(f"org_{n}", "usage-export", "@hourly") // timedelta(seconds=1) for n in range(10_000)
    )

    assert max(slots.values()) < 5 * 10_000 / 3600
    assert min(slots) >= 0
    assert max(slots) < 3600


def test_the_slot_of_a_definition_never_changes():
    """Written down: another value here would move every spread definition of every installation."""
    assert spread("org_acme", "usage-export", "@hourly") == timedelta(seconds=3454.154)
    assert spread("org_acme", "usage-import", "@hourly") != spread("org_acme", "usage-export", "@hourly")


@pytest.mark.parametrize(
    ("schedule", "setting", "widest"),
    [
        ("every 2s", "auto", timedelta(seconds=2)),
        ("every 15m", "auto", timedelta(minutes=15)),
        ("every 7d", "auto", HOUR),
        ("@daily", "auto", HOUR),
        ("0 * * * *", timedelta(minutes=5), timedelta(minutes=5)),
    ],
)
def test_the_spread_is_narrower_than_its_window(schedule, setting, widest):
    spreads = [spread(f"org_{n}", "x", schedule, setting) for n in range(200)]

    assert all(timedelta(0) <= each < widest for each in spreads)
    assert max(spreads) > widest * 0.9


@pytest.mark.parametrize(
    ("schedule", "setting"),
    [("0 * * * *", "auto"), ("at 2027-01-01T08:00:00Z", "auto"), ("@hourly", "off"), ("every 15m", "off")],
)
def test_crontab_lines_and_what_is_off_fire_at_their_instant(schedule, setting):
    assert spread("org_acme", "x", schedule, setting) == timedelta(0)
