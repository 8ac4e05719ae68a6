"""The PostgreSQL that every measurement gets for itself: it syncs to disk, with its own defaults but one."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fakes.postgres import Server

# As a machine of its own would have: the tables of a million runs stay in memory.
SHARED_BUFFERS = "512MB"


@contextlib.contextmanager
def own_server() -> Iterator[Server]:
    """A server in a folder that is gone with it."""
    with tempfile.TemporaryDirectory(prefix="orgworker-bench-") as folder:
        # The server runs as another user where the caller is root.
        Path(folder).chmod(0o755)
        server = Server(Path(folder) / "pg", durable=True, shared_buffers=SHARED_BUFFERS)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)
