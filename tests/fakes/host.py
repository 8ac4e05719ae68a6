"""A stand-in for the worker that tests may kill: runs one handler in a child until it is told to end.

`python -m tests.fakes.host PLUGIN_FOLDER HANDLER PARAMS_JSON LOCK_FD|- LEASE_SECONDS|-`; it prints a line of
JSON each for its zygote, each checkpoint and each outcome.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from tests.fakes.running import RecordingServices, work
from worker.clock import SystemClock
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.contract import StopSignal
from worker.runs.lease import Lease


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def renew(children: ChildPool, lease: timedelta) -> None:
    while True:
        children.renewed(Lease.begun(lease, time.monotonic()))
        time.sleep(lease.total_seconds() / 10)


async def main() -> None:
    folder, handler, params, lock, seconds = sys.argv[1:]
    sys.path.append(folder)
    lease = None if seconds == "-" else timedelta(seconds=float(seconds))
    children = ChildPool(SystemClock(), lock_fd=None if lock == "-" else int(lock))
    children.start()
    if lease is not None:
        threading.Thread(target=renew, args=(children, lease), daemon=True).start()
    tell(zygote=children.zygote_pid)
    link = RecordingServices(on_save=lambda data: tell(saved=json.loads(data)))
    outcome = await children.run(work(handler, params=json.loads(params)), link, StopSignal())
    tell(outcome=type(outcome).__name__)
    await children.close()


if __name__ == "__main__":
    asyncio.run(main())
