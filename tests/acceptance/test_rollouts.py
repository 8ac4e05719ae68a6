"""A rollout on a real worker that is killed: a version that becomes worse at a known instant is halted."""

from __future__ import annotations

import pytest

from tests.conftest import on_either
from tests.fakes.site import Site
from tests.fakes.worse_version import WorseVersion

pytestmark = pytest.mark.feature("rollouts")


@pytest.mark.timeout(900)
@on_either
def test_a_version_that_becomes_worse_is_halted(site_on_either: Site):
    story = WorseVersion(site_on_either, orgs=60)

    story.check(story.run())
