"""A day of hourly runs over several workers that are restarted: one request per org and lifetime."""

from __future__ import annotations

from bench.token_day import MAX_REQUESTS, count


async def test_hourly_runs_request_one_token_per_lifetime():
    assert await count(orgs=20, hours=3, workers=4) <= MAX_REQUESTS


async def test_restarts_and_workers_request_no_token_again():
    """Tokens of a day; the control requests one for each org, worker and restart."""
    shared = await count(orgs=10, hours=6, workers=4, lifetime=86_400)

    assert shared == 1.0
    assert await count(orgs=10, hours=6, workers=4, lifetime=86_400, shared=False) > 3
