"""A thread that was there before a run is sealed is sealed with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import socket, sys, threading
from worker.engine.runners.child import seccomp
go, seen = threading.Event(), []
def act():
    go.wait()
    try:
        socket.socket().close()
        seen.append("open")
    except PermissionError:
        seen.append("sealed")
thread = threading.Thread(target=act)
thread.start()
if sys.argv[1] == "sealed":
    seccomp.restrict(seccomp.SEALED)
go.set()
thread.join()
print(seen[0])
"""


@pytest.mark.parametrize("how", ["sealed", "open"])
def test_a_thread_of_before_has_no_sockets_either(how: str) -> None:
    """An import of the zygote may start one after each fork, as some exporters of traces do."""
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == how
