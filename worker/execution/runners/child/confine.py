"""A process just forked by the zygote -> a run's own: session, descriptors, limits, folder."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from dataclasses import dataclass

from worker.execution.runners.child import linux
from worker.execution.runners.child.landlock import Ruleset
from worker.execution.runners.child.sandbox import confine
from worker.handlers import denials

# What a run may hold beyond its cap before malloc itself refuses: thread stacks and the like count here.
_DATA_SLACK = 64 * 1024 * 1024
# Open descriptors of a run: what select(2) can bear, and what it may raise that to.
FILES = 1024
MOST_FILES = 8192
# Seconds of processor time beyond the timeout, a grace among them; and between SIGXCPU and SIGKILL.
CPU_SLACK = 3600.0
_CPU_GRACE = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run lives: its descriptors, its empty folder, its cap of memory in bytes, the seconds
    until its timeout, and the file by which it enters its cgroup, if it has one.
    """

    channel: int
    stdout: int
    stderr: int
    folder: str
    memory: int | None
    seconds: float
    group: str | None = None


def enter(place: Place, *, zygote: int, lock: int | None, ruleset: Ruleset | None) -> None:
    """Make this process that run's own; raises OSError where the kernel refuses."""
    os.setsid()
    linux.die_with_parent()
    if os.getppid() != zygote:  # it died before the line above
        os._exit(os.EX_UNAVAILABLE)
    linux.become_subreaper()
    if place.group is not None:
        _join(place.group)
    _default_signals()
    confined = () if ruleset is None else (ruleset.descriptor, confine(ruleset))
    _keep_only(place, lock, *confined)
    _limit(place)
    os.chdir(place.folder)
    tempfile.tempdir = os.environ["HOME"] = os.environ["TMPDIR"] = place.folder
    if ruleset is not None:
        ruleset.restrict()
        denials.sandboxed()


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _keep_only(place: Place, lock: int | None, *others: int) -> None:
    own_lock = None if lock is None else linux.hold_shared(lock)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(place.stdout, 1)
    os.dup2(place.stderr, 2)
    kept = {place.channel, *others} if own_lock is None else {place.channel, own_lock, *others}
    # In as few calls as there are gaps: the zygote holds some forty, for the sandbox alone.
    first, last = 3, max(map(int, os.listdir("/proc/self/fd")))
    for number in sorted(kept):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, last + 1)


def _join(group: str) -> None:
    descriptor = os.open(group, os.O_WRONLY)
    try:
        os.write(descriptor, b"0")
    finally:
        os.close(descriptor)


def _limit(place: Place) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the token
    _lower(resource.RLIMIT_NOFILE, FILES, MOST_FILES)
    # For when nobody is there to end the run at its timeout; it may use every processor until then.
    most = int(max(place.seconds, 0) + CPU_SLACK) * (os.cpu_count() or 1)
    _lower(resource.RLIMIT_CPU, most, most + _CPU_GRACE)
    if place.memory is not None:
        # The zygote watches what is really used; this stops what is faster than its watch.
        most = linux.data_size() + 2 * place.memory + _DATA_SLACK
        _lower(resource.RLIMIT_DATA, most, most)


def _lower(what: int, soft: int, hard: int) -> None:
    """Set a limit, within the one that the worker itself was given."""
    given = resource.getrlimit(what)[1]
    if given != resource.RLIM_INFINITY:
        soft, hard = min(soft, given), min(hard, given)
    resource.setrlimit(what, (soft, hard))
