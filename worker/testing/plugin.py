"""The pytest plug-in: one fixture, and nothing of the worker is imported before a test asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from worker.testing.orgworker import Orgworker


@pytest.fixture
def orgworker() -> Orgworker:
    """Runs a handler as a worker would: the real attempt, on a clock of the test's own, nothing stored."""
    from worker.testing.orgworker import Orgworker

    return Orgworker()
