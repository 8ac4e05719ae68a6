"""Runs in processes of their own, with a broker; handlers in a plug-in that is found by sys.path alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.plugins import plugin_on_path
from tests.fakes.running import child_pool
from tests.integration.engine.conftest import anyio_backend
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.features.egress.handle import BrokerHandle

__all__ = ["anyio_backend"]

MODULE = "egress_jobs"
SOURCE = Path(__file__).with_name(f"{MODULE}.py")
CONFINED = {"landlocked": True, "filtered": True}


@pytest.fixture(scope="module")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the plug-in's distribution, on sys.path while the module's tests run."""
    with plugin_on_path(tmp_path_factory.mktemp("plugin"), SOURCE, {"get": f"{MODULE}:get"}) as folder:
        yield folder


@pytest.fixture(scope="module")
async def broker(plugin_folder: Path) -> AsyncIterator[BrokerHandle]:
    """The broker of `children`, which starts and closes it."""
    yield BrokerHandle(SystemClock(), CONFINED)


@pytest.fixture(scope="module")
async def children(broker: BrokerHandle) -> AsyncIterator[ChildPool]:
    """A runner as on SQLite: without a lease, so nothing is frozen. Its runs are confined."""
    rules = Planner([]).rules([], [])
    async with child_pool(attached=True, sandbox=rules, spares=1, broker=broker) as runner:
        yield runner
