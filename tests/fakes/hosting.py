"""A process that plays the worker and that tests may kill: it runs one handler in a child process.

`python -m tests.fakes.hosting PLUGIN_FOLDER HANDLER PARAMS_JSON LOCK_FD|- LEASE_SECONDS|-` prints a line of
JSON for its zygote, each checkpoint and each outcome. `Host` starts it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import sizes, until, work
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal
from worker.model.runs.lease import Lease

# The processes of the handler `family`; each appends to a file of its name while it lives.
FAMILY = {"leader", "child", "session", "orphan"}


class Host:
    """The process, with one run of a handler."""

    def __init__(
        self,
        plugin: Path,
        folder: Path,
        *,
        handler: str = "family",
        lock: int | None = None,
        lease: float | None = None,
    ) -> None:
        arguments = [
            *(str(plugin), handler, json.dumps({"folder": str(folder)})),
            *("-" if number is None else str(number) for number in (lock, lease)),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.hosting", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[] if lock is None else [lock],
        )
        self.zygote: int = self.heard()["zygote"]

    def heard(self) -> dict[str, Any]:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(self.process.stdout.readline())
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


async def all_up(folder: Path) -> None:
    """Wait until each process of the family has written."""
    await until(lambda: set(sizes(folder)) >= FAMILY)


async def all_silent_within(folder: Path, seconds: float) -> None:
    """Check that no process writes after that many seconds."""
    await asyncio.sleep(seconds)
    before = sizes(folder)
    await asyncio.sleep(0.3)
    assert sizes(folder) == before


async def all_writing(folder: Path) -> None:
    """Wait until each process of the family has written again."""
    before = sizes(folder)
    await until(lambda: all(size > before[name] for name, size in sizes(folder).items()))


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
    link = AnsweringWorker(on_save=lambda data: tell(saved=json.loads(data)))
    outcome = await children.run(work(handler, params=json.loads(params)), link, StopSignal())
    tell(outcome=type(outcome).__name__)
    await children.close()


if __name__ == "__main__":
    asyncio.run(main())
