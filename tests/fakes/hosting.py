"""Starts the stand-in for the worker, `host.py`, and watches the processes of its run by what they write."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fakes.running import sizes, until

# The processes of the handler `family`; each writes into a file of its name as long as it lives.
FAMILY = {"leader", "child", "session", "orphan"}


class Host:
    """A process that stands in for the worker, with one run of a handler."""

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
            [sys.executable, "-m", "tests.fakes.host", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[] if lock is None else [lock],
        )
        self.zygote: int = self.heard()["zygote"]

    def heard(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


async def all_up(folder: Path) -> None:
    """Each of the family has written."""
    await until(lambda: set(sizes(folder)) >= FAMILY)


async def all_silent_within(folder: Path, seconds: float) -> None:
    """Nobody writes any more after this time."""
    await asyncio.sleep(seconds)
    before = sizes(folder)
    await asyncio.sleep(0.3)
    assert sizes(folder) == before


async def all_writing(folder: Path) -> None:
    """Each of the family writes on."""
    before = sizes(folder)
    await until(lambda: all(size > before[name] for name, size in sizes(folder).items()))
