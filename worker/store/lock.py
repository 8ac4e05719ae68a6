"""The lock beside a SQLite file: one worker per file. A second worker names its holder.

Two kinds of lock on one file. The worker and its zygote share one flock(2): it is released when
both are gone, and the zygote ends only after every run is dead. Each run holds a read lock of its
own (F_OFD_SETLK), so that a run which outlives both still keeps the next worker out. A run never
has the descriptor of the flock: LOCK_UN on an inherited descriptor would release it for all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from worker.clock import Clock, SystemClock, to_text
from worker.errors import Busy, ConfigurationError
from worker.store.engine import make_folder, read_url

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True, slots=True)
class FileLock:
    """A held lock. The zygote inherits `fd`, so the lock lasts until worker and zygote are gone."""

    path: Path
    fd: int

    def release(self) -> None:
        """Give up this process's hold; the lock falls with its last holder."""
        os.close(self.fd)


def lock_sqlite_file(url: str, *, clock: Clock | None = None) -> FileLock:
    """Take `<file>.lock` beside the SQLite file that `url` names.

    Raises:
        Busy: another worker holds it, or a run of a dead worker; the message names host, pid and start.
        ConfigurationError: the lock file cannot be opened.
    """
    path = Path(f"{read_url(url).database}.lock")
    try:
        make_folder(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be opened: {error.strerror}",
            fix="the worker must be able to write in the folder of the database",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _refused(path, fd, error, "another worker holds", "stop it first") from None
    try:
        _lock_range(fd, fcntl.F_WRLCK)
        _lock_range(fd, fcntl.F_UNLCK)
    except OSError as error:
        raise _refused(
            path, fd, error, "runs of a worker that died hold", "end its processes first"
        ) from None
    started = to_text((clock or SystemClock()).now())
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{socket.gethostname()} {os.getpid()} {started}\n".encode(), 0)
    os.set_inheritable(fd, True)
    return FileLock(path, fd)


def _lock_range(fd: int, kind: int) -> None:
    """Lock or unlock the whole file for this open file alone; raises OSError where a run has locked it."""
    # struct flock: type, whence, start, length (0: the whole file), pid.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))


def _refused(path: Path, fd: int, error: OSError, who: str, first: str) -> Busy | ConfigurationError:
    holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
    os.close(fd)
    if error.errno not in _TAKEN:
        return ConfigurationError(
            f"{path} cannot be locked: {error.strerror}",
            fix="the file must lie on a local file system that supports flock and fcntl locks",
        )
    return Busy(
        f"{who} {path}: {_described(holder)}",
        fix=f"{first}; a SQLite file has one worker, several need PostgreSQL",
    )


def _described(holder: str) -> str:
    parts = holder.split()
    if len(parts) != 3:
        return "a process that has not written its name yet"
    return f"process {parts[1]} on {parts[0]}, since {parts[2]}"
