"""What the kernel offers to hold a tree of processes: prctl(2), proc(5), signals.

A process is found by its ancestry, not by its group or session: it can leave those,
while its parents are the kernel's to say.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")

DESCRIPTORS = 65_536

_libc = ctypes.CDLL(None, use_errno=True)


class Process(NamedTuple):
    """One line of the process table; `started` is in seconds since boot."""

    pid: int
    parent: int
    session: int
    state: str
    started: float


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be killed when the thread that forked this process ends (PR_SET_PDEATHSIG); fork clears it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hide_memory() -> None:
    """Keep others of the same user from reading this process's memory; exec undoes it (PR_SET_DUMPABLE)."""
    _prctl(_PR_SET_DUMPABLE, 0)


def hold_shared(descriptor: int) -> int:
    """Open the file of a descriptor again and lock it for reading; returns the new descriptor.

    The lock belongs to the new open file (F_OFD_SETLK). A process that gives it up gives up no
    lock of those who hold `descriptor`, which flock(2) would do through an inherited one.
    Raises OSError where the file is locked for writing.
    """
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    # struct flock: type, whence, start, length (0: the whole file), pid.
    fcntl.fcntl(own, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    return own


def processes() -> dict[int, Process]:
    """The process table of this moment, by pid."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := process_of(int(name))) is not None:
            table[process.pid] = process
    return table


def process_of(pid: int) -> Process | None:
    """One process, or None if it is gone."""
    line = _read(f"/proc/{pid}/stat")
    if line is None:
        return None
    # The name in parentheses may itself contain any character.
    fields = line.rpartition(b")")[2].split()
    return Process(pid, int(fields[1]), int(fields[3]), fields[0].decode(), int(fields[19]) / _TICKS)


def descendants(table: Mapping[int, Process], roots: Iterable[int]) -> set[int]:
    """All processes below the roots, the roots left out."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    line = [child for root in roots for child in children.get(root, ())]
    while line:
        pid = line.pop()
        if pid not in found:
            found.add(pid)
            line += children.get(pid, ())
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process that is gone is no error."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        # Another user's process can only be one that a setuid program of the run has become.
        return


def reap(pid: int) -> None:
    """Take leave of a child of ours that has ended, if it has."""
    with contextlib.suppress(ChildProcessError):  # someone else already did
        os.waitpid(pid, os.WNOHANG)


def reap_adopted(*, besides: int) -> None:
    """Take leave of processes that became our children and have ended; our own share our session."""
    session, me = os.getsid(0), os.getpid()
    for process in processes().values():
        adopted = process.parent == me and process.session != session and process.pid != besides
        if adopted and process.state == "Z":
            reap(process.pid)


def allow_many_descriptors() -> None:
    """Raise the soft limit of open descriptors: each run takes three here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stop_all(find: Callable[[], set[int]]) -> None:
    """Freeze all that `find` finds (SIGSTOP), also what they fork in the meantime."""
    stopped: set[int] = set()
    for _ in range(100):
        fresh = find() - stopped
        if not fresh:
            return
        for pid in fresh:
            send(pid, signal.SIGSTOP)
        stopped |= fresh


def memory(pids: Iterable[int], *, own: int, limit: int) -> int:
    """How much memory processes that descend from this one use together, in bytes.

    Above `limit` it is their proportional set size, in which what several share counts
    once; below, the cheaper sum of what each holds resident, which is no less. One that
    hides its memory was forked without exec, and shares `own` bytes with this one.
    """
    pids = list(pids)
    rough = sum(resident(pid) for pid in pids)
    if rough <= limit:
        return rough
    return sum(max(resident(pid) - own, 0) if (size := _proportional(pid)) is None else size for pid in pids)


def resident(pid: int) -> int:
    """The resident memory of a process in bytes; 0 if it is gone."""
    line = _read(f"/proc/{pid}/statm")
    return int(line.split()[1]) * _PAGE if line else 0


def data_size() -> int:
    """This process's own private data in bytes, as RLIMIT_DATA counts it."""
    line = _read("/proc/self/statm")
    return int(line.split()[5]) * _PAGE if line else 0


def _proportional(pid: int) -> int | None:
    text = _read(f"/proc/{pid}/smaps_rollup")
    if text is None:
        return None
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(descriptor, 16_384)
    except OSError:  # it ended between the two
        return None
    finally:
        os.close(descriptor)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl({option})")
