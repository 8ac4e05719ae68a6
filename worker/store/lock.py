"""The lock beside a SQLite file: one worker a file, by flock, and a second is told who holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from worker.clock import Clock, SystemClock, to_text
from worker.errors import Busy, ConfigurationError
from worker.store.engine import read_url


@dataclass(frozen=True, slots=True)
class FileLock:
    """A held lock. The zygote and its children inherit `fd`, so it falls when all of them are gone."""

    path: Path
    fd: int

    def release(self) -> None:
        """Give up this process's hold; the lock falls with its last holder."""
        os.close(self.fd)


def lock_sqlite_file(url: str, *, clock: Clock | None = None) -> FileLock:
    """Take `<file>.lock` beside the SQLite file that `url` names.

    Raises:
        Busy: another process holds it; the message names host, pid and start.
        ConfigurationError: the lock file cannot be opened.
    """
    path = Path(f"{read_url(url).database}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be opened: {error.strerror}",
            fix="the worker must be able to write in the folder of the database",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConfigurationError(
                f"{path} cannot be locked: {error.strerror}",
                fix="the file must lie on a local file system that knows flock",
            ) from error
        raise Busy(
            f"another worker holds {path}: {_described(holder)}",
            fix="stop it first; a SQLite file has one worker, several need PostgreSQL",
        ) from None
    started = to_text((clock or SystemClock()).now())
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{socket.gethostname()} {os.getpid()} {started}\n".encode(), 0)
    os.set_inheritable(fd, True)
    return FileLock(path, fd)


def _described(holder: str) -> str:
    parts = holder.split()
    if len(parts) != 3:
        return "a process that has not written its name yet"
    return f"process {parts[1]} on {parts[0]}, since {parts[2]}"
