"""Free ports of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from pathlib import Path

# Below the ports that Linux gives to outgoing connections: one of those may be taken a moment later.
FIRST = 20_000
COUNT = 12_000
# How often a port was given away, over all test processes of this user.
GIVEN = Path(tempfile.gettempdir()) / f"orgworker-ports-{os.getuid()}"


def free_port() -> int:
    """A port of 127.0.0.1 that is free, and that no test process gets again until all others were given."""
    with GIVEN.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or 0)
        while True:
            number += 1
            with socket.socket() as one, contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("127.0.0.1", FIRST + number % COUNT))
                break
        file.truncate(0)
        file.write(str(number))
    return FIRST + number % COUNT
