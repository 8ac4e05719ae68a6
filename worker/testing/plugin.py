"""The pytest plug-in: one fixture. The worker is imported only when a test uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from worker.testing.orgworker import Orgworker


@pytest.fixture
def orgworker() -> Orgworker:
    """Runs a handler as a worker would: the real attempt on the test's clock, with nothing stored."""
    from worker.testing.orgworker import Orgworker

    return Orgworker()
