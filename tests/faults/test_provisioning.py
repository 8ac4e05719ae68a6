"""`orgs sync --provision` killed at random points: a rerun makes nothing twice and leaves no orphan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.kinde.faults import Script
from tests.fakes.kinde.server import MANAGER
from tests.fakes.provisioning import Fleet, fleet


@pytest.mark.timeout(1800)
def test_kills_at_random_points_make_no_duplicate_and_no_orphan(
    tmp_path: Path, migrated_url: str, full: bool
) -> None:
    # More orgs than kills: each kill comes while something is left to do.
    orgs, kills = (240, 200) if full else (12, 6)
    # Two at a time: the kills are spread over all orgs, not only over the first few.
    with fleet(tmp_path, orgs, migrated_url, concurrency=2) as made:
        made.kinde.script = Script(7, error=0.02, late_error=0.02, cut=0.02, tokens=True)
        done = made.kill_often(kills, seed=14)
        calls = made.finish()

        assert done == kills
        assert made.wrongs() == []
        assert orphans(made) == []
        assert made.undocumented() == []
        shown = "".join(call.out + call.err for call in calls)
        assert not any(app.client_secret in shown for app in made.kinde.provider.applications.values())


def test_an_application_that_nobody_uses_is_found(tmp_path: Path) -> None:
    """The control: the checks of the test above see a duplicate, and one without a credential here."""
    with fleet(tmp_path, 1) as made:
        made.finish()
        provider = made.kinde.provider
        mine = next(app for app in provider.applications.values() if app.client_id != MANAGER)
        *_, key, org = mine.name.split(" ")
        provider.management.make_application(mine.name.replace(key, "0000-0000"), org)

        assert made.wrongs() == [f"{org}: 2 applications at the provider"]
        assert len(orphans(made)) == 1


def orphans(made: Fleet) -> list[object]:
    listed: list[object] = made.run("orgs", "sync", "--orphans", "-o", "json").checked("orphans").json()
    return listed
