"""A process just forked by the zygote -> a run's own: session, descriptors, limits, folder."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import tempfile
from dataclasses import dataclass

from worker.execution import linux

# What a run may hold beyond its cap before malloc itself refuses: thread stacks and the like count here.
_DATA_SLACK = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run lives: its descriptors, its empty folder, its cap of memory in bytes."""

    channel: int
    stdout: int
    stderr: int
    folder: str
    memory: int | None


def enter(place: Place, *, zygote: int, lock: int | None) -> None:
    """Make this process that run's own; raises OSError where the kernel refuses."""
    os.setsid()
    linux.die_with_parent()
    if os.getppid() != zygote:  # it died before the line above
        os._exit(os.EX_UNAVAILABLE)
    linux.become_subreaper()
    _default_signals()
    _keep_only(place, lock)
    _limit(place.memory)
    os.chdir(place.folder)
    tempfile.tempdir = place.folder


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _keep_only(place: Place, lock: int | None) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(place.stdout, 1)
    os.dup2(place.stderr, 2)
    kept = {0, 1, 2, place.channel, lock}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            # One of them was the listing's own, and is closed by now.
            with contextlib.suppress(OSError):
                os.close(int(name))


def _limit(memory: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the token
    if memory is not None:
        # The zygote watches what is really used; this stops what is faster than its watch.
        most = linux.data_size() + 2 * memory + _DATA_SLACK
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
