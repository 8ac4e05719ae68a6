"""How many token requests a day definitions imply."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker.operations.requirements import requests_a_day

DAY = 86_400.0
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("runs", "lifetime", "expected"),
    [
        ([(1440, None)], DAY, 2),  # a token of a day serves a day, renewed early
        ([(1440, None)], 3600.0, 33),
        ([(24, None)], 1200.0, 24),  # never more than runs
        ([(0, None)], DAY, 0),
        ([(1440, timedelta(minutes=5))], DAY, 290),
        ([(1440, timedelta(seconds=1))], DAY, 1440),  # a minute is the floor
        ([(1440, None), (24, MINUTE)], DAY, 26),  # they share a token; only the second asks for newer ones
    ],
)
def test_requests_follow_schedules_lifetimes_and_claims_age(runs, lifetime, expected):
    assert requests_a_day(runs, lifetime) == expected


def test_each_worker_has_a_cache_of_its_own():
    assert requests_a_day([(1440, None)], 3600.0, workers=3) == 99
    assert requests_a_day([(24, None)], 3600.0, workers=3) == 24
