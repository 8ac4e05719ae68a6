"""Runs in processes of their own, with a broker; handlers in a plug-in that is found by sys.path alone."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.plugins import make_plugin
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.features.egress.handle import BrokerHandle

MODULE = "egress_jobs"
SOURCE = Path(__file__).with_name(f"{MODULE}.py")
CONFINED = {"landlocked": True, "filtered": True}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for a module, so that its tests share a zygote and a broker."""
    return "asyncio"


@pytest.fixture(scope="module")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the plug-in's distribution, on sys.path while the module's tests run."""
    folder = make_plugin(
        tmp_path_factory.mktemp("plugin"),
        modules={MODULE: SOURCE.read_text()},
        entry_points={"get": f"{MODULE}:get"},
    )
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
async def broker(plugin_folder: Path) -> AsyncIterator[BrokerHandle]:
    """The broker of `children`, which starts and closes it."""
    yield BrokerHandle(SystemClock(), CONFINED)


@pytest.fixture(scope="module")
async def children(broker: BrokerHandle) -> AsyncIterator[ChildPool]:
    """A runner as on SQLite: without a lease, so nothing is frozen. Its runs are confined."""
    runner = ChildPool(SystemClock(), sandbox=Planner([]).rules([], []), spares=1, broker=broker)
    runner.start()
    runner.attach()
    yield runner
    await runner.close()
