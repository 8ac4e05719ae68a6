"""What has come and was not fired is found, the oldest first, on either database."""

from __future__ import annotations

from datetime import timedelta

from worker.store.health import oldest_unfired


def test_the_oldest_instant_that_nobody_fired_is_named_with_its_age(stock):
    org = stock.org()
    now = stock.now()
    assert stock.reading(oldest_unfired) is None

    stock.definition(org, due_at=now + timedelta(hours=1))
    assert stock.reading(oldest_unfired) is None

    stock.definition(org, due_at=now - timedelta(seconds=30))
    stock.definition(org, due_at=now - timedelta(seconds=90))
    found = stock.reading(oldest_unfired)

    assert found is not None
    code, name, seconds = found
    assert code.startswith("org_")
    assert name
    assert 90 <= seconds < 120
