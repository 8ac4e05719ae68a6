"""What a running attempt may ask of its worker, by every carrier and on both databases."""

from __future__ import annotations

import pytest

from tests.integration.hosts.conftest import database, fleet

__all__ = ["anyio_backend", "database", "fleet"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for a module, so that its tests share workers and a zygote."""
    return "asyncio"
