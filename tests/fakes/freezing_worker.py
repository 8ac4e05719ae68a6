"""A worker whose scheduler loop hangs as long as a file is there; started in place of `python -m worker`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from worker.cli import main
from worker.execution.loops import supervisor
from worker.execution.loops.scheduler import Scheduler
from worker.runs.run import FireReport

FILE = "FREEZE_WHEN"
# Seconds instead of the worker's own patience, so that nobody has to wait.
PATIENCE = 2.0

_fire = Scheduler._fire


async def fire_or_hang(scheduler: Scheduler) -> FireReport:
    while Path(os.environ[FILE]).exists():  # noqa: ASYNC110 - a file says nothing of its end
        await asyncio.sleep(0.05)
    return await _fire(scheduler)


if __name__ == "__main__":
    supervisor.PATIENCE = PATIENCE
    Scheduler._fire = fire_or_hang  # type: ignore[method-assign]
    main()
