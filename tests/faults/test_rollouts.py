"""300 orgs and workers that are killed: a version that becomes worse at a known instant is halted.

With FAULTS=full; the gate has 60 orgs in tests/acceptance/test_rollouts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FULL, on_either
from tests.fakes.handlers import install_handlers
from tests.fakes.site import Site, opened
from tests.fakes.worse_version import EXECUTION, WorseVersion
from worker.demo.provider import Provider

pytestmark = [pytest.mark.feature("rollouts"), pytest.mark.skipif(not FULL, reason="FAULTS=full")]


@pytest.fixture
def site(tmp_path: Path, provider: Provider, migrated_url: str) -> Iterator[Site]:
    with opened(Site(tmp_path, migrated_url, provider)) as made:
        made.configure(execution=EXECUTION)
        install_handlers(made.plugins)
        made.migrate()
        yield made


@pytest.mark.timeout(3600)
@on_either
def test_a_version_that_becomes_worse_for_300_orgs_is_halted(site: Site):
    on_file = site.database_url.startswith("sqlite")
    story = WorseVersion(site, orgs=300, every=15.0, workers=1 if on_file else 3, kills=5)

    story.check(story.run())
