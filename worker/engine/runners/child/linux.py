"""Linux: how to contain a tree of processes, with prctl(2), proc(5), signals and cgroups(7).

Processes are found by their ancestry: a process can leave its group or session, but not choose its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")

DESCRIPTORS = 65_536
# Descriptors of runs that one look for files in memory reads, in some 4 ms.
MAX_LOOKED_AT = 512
END = object()
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
WORKER_CGROUP = "worker"

_libc = ctypes.CDLL(None, use_errno=True)
_malloc_trim = getattr(_libc, "malloc_trim", None)


class ProcessName(StrEnum):
    """What `ps` and `top` show, in the 15 bytes that the kernel keeps. Every user sees it: no org, no run."""

    WORKER = "orgworker"
    HOST = "orgworker-host"
    SERVE = "orgworker-serve"
    PROVISION = "orgworker-prov"
    RELAY = "orgworker-relay"
    ZYGOTE = "orgworker-zyg"
    RUN = "orgworker-run"
    DESCRIBE = "orgworker-desc"
    BROKER = "orgworker-brok"
    CHECK = "orgworker-check"


class Process(NamedTuple):
    """One line of the process table; `started` is in seconds since boot."""

    pid: int
    parent: int
    session: int
    state: str
    started: float


def become_subreaper() -> None:
    """Adopt orphans among this process's descendants (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Die when the thread that forked this process ends (PR_SET_PDEATHSIG); fork clears this."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def name_process(name: ProcessName) -> None:
    """Set the name of this process (PR_SET_NAME), from its main thread; fork keeps it, exec does not."""
    _prctl(_PR_SET_NAME, name.encode())


def lower_limit(what: int, soft: int, hard: int) -> None:
    """Set a limit, within those that this process has."""
    given = resource.getrlimit(what)[1]
    if given != resource.RLIM_INFINITY:
        soft, hard = min(soft, given), min(hard, given)
    resource.setrlimit(what, (soft, hard))


def hide_memory() -> None:
    """Hide this process's memory from others of the same user (PR_SET_DUMPABLE); exec undoes this."""
    _prctl(_PR_SET_DUMPABLE, 0)


def show_memory() -> None:
    """Undo `hide_memory`, in a process that the sandbox protects from other runs."""
    _prctl(_PR_SET_DUMPABLE, 1)


def hold_shared(descriptor: int) -> int:
    """Open the file of a descriptor again and lock it for reading (F_OFD_SETLK); returns the new descriptor.

    Releasing this lock keeps that of `descriptor`. Raises OSError if the file is locked for writing.
    """
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    # struct flock: type, whence, start, length (0: the whole file), pid.
    fcntl.fcntl(own, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    return own


def processes() -> dict[int, Process]:
    """The current process table, by pid."""
    found = (process_of(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


class Relatives:
    """The processes below this one, for one that looks often and on a machine with many others.

    A process that is not below this one never will be, so it is read once. The inode of its folder in proc(5)
    tells it from a later one with the same pid.
    """

    def __init__(self) -> None:
        self._own = os.getpid()
        own = process_of(self._own)
        self._born = 0.0 if own is None else own.started
        self._others: dict[int, int] = {}

    def table(self) -> dict[int, Process]:
        """The process table, by pid, without processes that are known not to be below this one."""
        known: dict[int, int] = {}
        unknown: dict[int, int] = {}
        with os.scandir("/proc") as entries:
            for entry in entries:
                if entry.name.isdigit():
                    pid, inode = int(entry.name), entry.inode()
                    (known if self._others.get(pid) == inode else unknown)[pid] = inode
        self._others, table = known, {}
        for pid in sorted(unknown):
            process = process_of(pid)
            if process is None:
                continue
            # Not by a chain of parents: one of them may have ended while this was read.
            if pid != self._own and (process.started < self._born or process.parent in known):
                known[pid] = unknown[pid]
            else:
                table[pid] = process
        return table


def process_of(pid: int) -> Process | None:
    """One process, or None if it is gone."""
    line = _read(f"/proc/{pid}/stat")
    if line is None:
        return None
    # The name in parentheses may contain any character.
    fields = line.rpartition(b")")[2].split()
    return Process(pid, int(fields[1]), int(fields[3]), fields[0].decode(), int(fields[19]) / _TICKS)


def descendants(table: Mapping[int, Process], roots: Iterable[int]) -> set[int]:
    """All processes below the roots, without the roots."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    queue = [child for root in roots for child in children.get(root, ())]
    while queue:
        pid = queue.pop()
        if pid not in found:
            found.add(pid)
            queue += children.get(pid, ())
    return found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes that may be gone, or may be a setuid program that a run has started."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(pid: int) -> None:
    """Reap a child if it has ended."""
    with contextlib.suppress(ChildProcessError):  # already reaped
        os.waitpid(pid, os.WNOHANG)


async def reap_at_end(pid: int) -> None:
    """Wait for the end of a child that asyncio did not start, and reap it."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.suppress(ProcessLookupError):  # already reaped
        pidfd = os.pidfd_open(pid)
        try:
            loop.add_reader(pidfd, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
    reap(pid)


def adopted(table: Mapping[int, Process]) -> list[Process]:
    """The processes that this one has adopted: its own children share its session."""
    session, me = os.getsid(0), os.getpid()
    return [process for process in table.values() if process.parent == me and process.session != session]


def release_memory() -> None:
    """Give the kernel memory that was freed; takes a millisecond for some 10 MB. Only glibc keeps it."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def allow_many_descriptors() -> None:
    """Raise the soft limit of open descriptors: each run takes three here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stop_all(find: Callable[[], set[int]]) -> None:
    """Freeze the processes that `find` returns (SIGSTOP), also those that they fork meanwhile."""
    stopped: set[int] = set()
    for _ in range(100):
        fresh = find() - stopped
        if not fresh:
            return
        send(fresh, signal.SIGSTOP)
        stopped |= fresh


def memory(pids: Iterable[int], *, own: int, limit: int, files: int = 0) -> int:
    """The memory of descendants of this process, in bytes; `files` is that of files in memory.

    Up to `limit` the sum of their resident sizes, which is cheap and never too low; above it their
    proportional set size, which counts shared memory once. One that hides its memory was forked without
    exec, and shares `own` bytes with this process. Files in memory may be mapped, and then count once.
    """
    pids = list(pids)
    total = sum(resident(pid) for pid in pids) + files
    if total <= limit:
        return total
    private = shared = 0
    for pid in pids:
        size = _proportional(pid)
        if size is None:
            private += max(resident(pid) - own, 0)
        else:
            private += size[0] - size[1]
            shared += size[1]
    return private + max(shared, files)


class MemoryFiles:
    """Files in memory that processes hold (memfd_create): no resident size counts what is not mapped.

    A look reads at most MAX_LOOKED_AT descriptors, and the next one goes on from there. A run with thousands
    delays when files are found, but not the process that looks.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, dict[tuple[int, int], int]] = {}
        self._pass: Iterator[None] | None = None

    def look(self, pids: Iterable[int]) -> None:
        """Read what these processes hold now, as far as they do not hide it; forget all others."""
        self._sizes = {pid: self._sizes.get(pid, {}) for pid in sorted(pids)}
        if self._pass is None:
            self._pass = self._read(list(self._sizes))
        for _ in range(MAX_LOOKED_AT):
            if next(self._pass, END) is END:
                self._pass = None
                return

    def size(self, pids: Iterable[int]) -> int:
        """The bytes in these processes' files, each file once."""
        files: dict[tuple[int, int], int] = {}
        for pid in pids:
            files |= self._sizes.get(pid, {})
        return sum(files.values())

    def _read(self, pids: Iterable[int]) -> Iterator[None]:
        """Read the descriptors of processes, one at each step."""
        for pid in pids:
            files = {}
            with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    yield
                    with contextlib.suppress(OSError):  # it was closed meanwhile
                        # Nothing else is asked for its size: a file system could keep this process waiting.
                        if os.readlink(entry.path).startswith("/memfd:"):
                            found = os.stat(entry.path)
                            files[found.st_dev, found.st_ino] = found.st_blocks * 512
            if pid in self._sizes:
                self._sizes[pid] = files


def resident(pid: int) -> int:
    line = _read(f"/proc/{pid}/statm")
    return int(line.split()[1]) * _PAGE if line else 0


def data_size() -> int:
    """The private data of this process in bytes, as RLIMIT_DATA counts it."""
    line = _read("/proc/self/statm")
    return int(line.split()[5]) * _PAGE if line else 0


def _proportional(pid: int) -> tuple[int, int] | None:
    """The proportional set size, and the part of it in shared memory; None if the process hides it."""
    text = _read(f"/proc/{pid}/smaps_rollup")
    if text is None:
        return None
    lines = (line.split() for line in text.splitlines())
    sizes = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in (b"Pss:", b"Pss_Shmem:")}
    return sizes.get(b"Pss:", 0), sizes.get(b"Pss_Shmem:", 0)


def _read(path: str) -> bytes | None:
    # The process may end before it is opened, and between that and reading.
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        return file.read(16_384)
    return None


def _prctl(option: int, value: int | bytes) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl({option})")


class RunGroups:
    """A cgroup for each run with a memory cap, in a folder that the service manager has delegated.

    That folder is the parent of the worker's own cgroup, if that is called `worker`, as
    `DelegateSubgroup=worker` of the unit makes it. Other cgroups are not ours to change.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended: set[Path] = set()

    @classmethod
    def find(cls, root: Path = CGROUPS, own: Path = OWN_CGROUP) -> RunGroups | None:
        """The delegated folder, or None; then only the zygote enforces the caps."""
        try:
            lines = own.read_text().splitlines()
            path = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
            mine = root / path.strip("/")
            controllers = (mine.parent / "cgroup.controllers").read_text().split()
            if mine.name != WORKER_CGROUP or "memory" not in controllers:
                return None
            (mine.parent / "cgroup.subtree_control").write_text("+memory")
        except (OSError, StopIteration):  # cgroup v1, a read-only tree, or nothing delegated
            return None
        return cls(mine.parent)

    def make(self, run: int) -> str | None:
        """Make a cgroup for a process, which sets the cap itself; returns its folder, or None."""
        group = self._of(run)
        try:
            group.mkdir()
            (group / "memory.oom.group").write_text("1")
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                (group / "memory.swap.max").write_text("0")
        except OSError:
            self._ended.add(group)
            return None
        return str(group)

    def ran_out(self, run: int) -> bool:
        """Whether the kernel has killed this run because of its cap."""
        try:
            events = (self._of(run) / "memory.events").read_text().split()
        except OSError:
            return False
        return int(dict(zip(events[::2], events[1::2], strict=False)).get("oom_kill", 0)) > 0

    def remove(self, run: int) -> None:
        """Remove the cgroup of a run that has ended; if that fails, with a later one."""
        self._ended.add(self._of(run))
        for group in list(self._ended):
            with contextlib.suppress(OSError):  # the kernel is still cleaning up one of its processes
                with contextlib.suppress(FileNotFoundError):
                    group.rmdir()
                self._ended.discard(group)

    def _of(self, run: int) -> Path:
        return self._folder / f"run-{os.getpid()}-{run}"


def join_cgroup(folder: str) -> int:
    """Move this process into a cgroup; returns a descriptor for `write_cap`. Raises OSError."""
    entry = os.open(f"{folder}/cgroup.procs", os.O_WRONLY)
    try:
        os.write(entry, b"0")
    finally:
        os.close(entry)
    return os.open(f"{folder}/memory.max", os.O_WRONLY | os.O_CLOEXEC)


def write_cap(descriptor: int, memory: int | None) -> None:
    """Set the cap of a cgroup, in bytes, and close its descriptor."""
    try:
        if memory is not None:
            os.write(descriptor, str(memory).encode())
    finally:
        os.close(descriptor)


def exit_words(code: int) -> str:
    """How a process has ended, by its exit code as `subprocess` has it: `exit code 3`, `signal SIGSEGV`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"
