"""The rotation of a fleet under load, killed at random points: no failed run, no run without a token."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fakes.rotating import rotating


@pytest.mark.timeout(1800)
def test_a_fleet_is_rotated_under_load_in_spite_of_kills(
    tmp_path: Path, migrated_postgres_url: str, full: bool
) -> None:
    orgs, kills, every = (1000, 50, 20) if full else (8, 3, 2)
    with rotating(tmp_path, orgs, migrated_postgres_url, every=every) as made:
        made.warm_up(timeout=20 * every)
        done = made.kill_often(kills, seed=14, most=200 if full else 30)
        made.finish(timeout=1500)
        time.sleep(every)

    assert done == kills
    assert made.wrongs() == []
    counts = made.counts()
    assert counts["attempts"] > counts["with_old_tokens"] > 0
