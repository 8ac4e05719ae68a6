"""A separate PostgreSQL for each measurement: it syncs to disk, with all defaults but one."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.fakes.postgres import Server

# As on a dedicated machine: the tables of a million runs stay in memory.
SHARED_BUFFERS = "512MB"


def processor_time(pid: int) -> float:
    """Seconds of processor time of a process and its descendants, with those that have ended."""
    main = psutil.Process(pid)
    total = 0.0
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


@contextlib.contextmanager
def own_server() -> Iterator[Server]:
    """A server in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="orgworker-bench-") as folder:
        # The server runs as another user if the caller is root.
        Path(folder).chmod(0o755)
        server = Server(Path(folder) / "pg", durable=True, shared_buffers=SHARED_BUFFERS)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)
