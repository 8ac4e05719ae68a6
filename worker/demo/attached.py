"""`python -m worker.demo.attached PARENT COMMAND…`: becomes the command, which dies with the process PARENT.

The kernel sends SIGKILL when the thread that started it ends, so that a killed demo leaves nothing behind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from worker.execution.runners.child.linux import die_with_parent


def attached(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` attached to this process; start it from the main thread."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), *command]


def main() -> None:
    """Replace this process with the command."""
    parent, *command = sys.argv[1:]
    die_with_parent()
    # A parent that was gone before that sends no signal.
    if os.getppid() == int(parent):
        os.execv(command[0], command)  # noqa: S606 - its own command line, without a shell


if __name__ == "__main__":
    main()
