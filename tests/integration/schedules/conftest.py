"""A timeline on a fresh SQLite file; its clock stands still until a test moves it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.timeline import Timeline


@pytest.fixture
def timeline(migrated_sqlite_url: str, clock: ManualClock) -> Iterator[Timeline]:
    made = Timeline(migrated_sqlite_url, clock)
    yield made
    made.close()
