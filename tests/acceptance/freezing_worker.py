"""A worker whose scheduler loop hangs while a file exists; replaces `python -m worker`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from worker.app import main
from worker.engine.loops import supervisor
from worker.engine.loops.scheduler import Scheduler
from worker.model.runs.run import FireReport

FILE = "FREEZE_WHEN"
# Seconds; shorter than the worker's own, so that the test is fast.
PATIENCE = 2.0

_fire = Scheduler._fire


async def fire_or_hang(scheduler: Scheduler, limit: int) -> FireReport:
    while Path(os.environ[FILE]).exists():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.05)
    return await _fire(scheduler, limit)


if __name__ == "__main__":
    supervisor.PATIENCE = PATIENCE
    Scheduler._fire = fire_or_hang  # type: ignore[method-assign]
    main()
