"""A zygote for each module of tests, and handlers in a plug-in that is found by sys.path alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.plugins import plugin_on_path
from tests.fakes.running import MODULE, child_pool
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
    with plugin_on_path(tmp_path_factory.mktemp("plugin"), SOURCE, {"ok": f"{MODULE}:ok"}) as folder:
        yield folder


@pytest.fixture(scope="module")
async def children(plugin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChildPool]:
    """A runner as on SQLite: without a lease, so nothing is frozen.

    Its runs are confined as far as this kernel can, and may write where tests look. A spare serves most of
    them.
    """
    rules = replace(Planner([]).rules([], []), write=(str(tmp_path_factory.getbasetemp()), "/dev/shm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKER_DATABASE__URL", "postgresql://somebody:secret@somewhere")
        async with child_pool(attached=True, sandbox=rules, spares=1) as runner:
            patch.undo()
            yield runner
