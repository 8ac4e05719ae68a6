"""A zygote for each module of tests, and handlers in a plug-in that is found by sys.path alone."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.plugins import make_plugin
from tests.fakes.running import MODULE
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner

SOURCE = Path(__file__).with_name("process_jobs.py")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for a module, so that its tests share a zygote."""
    return "asyncio"


@pytest.fixture(scope="module")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the plug-in's distribution, on sys.path while the module's tests run."""
    folder = make_plugin(
        tmp_path_factory.mktemp("plugin"),
        modules={MODULE: SOURCE.read_text()},
        entry_points={"ok": f"{MODULE}:ok"},
    )
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
async def children(plugin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChildPool]:
    """A runner as on SQLite: without a lease, so nothing is frozen.

    Its runs are confined as far as this kernel can, and may write where tests look. A spare serves most of
    them.
    """
    rules = replace(Planner([]).rules([], []), write=(str(tmp_path_factory.getbasetemp()), "/dev/shm"))
    runner = ChildPool(SystemClock(), sandbox=rules, spares=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKER_DATABASE__URL", "postgresql://somebody:secret@somewhere")
        runner.start()
    runner.attach()
    yield runner
    await runner.close()
