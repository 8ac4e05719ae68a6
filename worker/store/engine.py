"""Engines: safe SQLAlchemy settings for each dialect, and the lock beside a SQLite file."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import select
import socket
import sqlite3
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidatePoolError

from worker.clock import Clock, SystemClock, to_text
from worker.errors import Busy, ConfigurationError
from worker.store.dialect import CLOCK, compact_json

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True, slots=True)
class FileLock:
    """A lock that this process holds. The zygote inherits `fd`: the lock lasts until both are gone."""

    path: Path
    fd: int

    def release(self) -> None:
        """Close this process's descriptor; the last holder's close releases the lock."""
        os.close(self.fd)


def lock_sqlite_file(url: str, *, clock: Clock | None = None) -> FileLock:
    """Lock `<file>.lock` beside the SQLite file that `url` names.

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
            fix="let the worker write in the folder of the database",
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


def lock_beside(url: URL, name: str) -> FileLock | None:
    """Lock `<file>.<name>.lock` beside a SQLite file for this process; None if another process holds it."""
    path = Path(f"{url.database}.{name}.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in _TAKEN:
            return None
        raise
    return FileLock(path, fd)


def _lock_range(fd: int, kind: int) -> None:
    """Lock or unlock the whole file for this open file alone; raises OSError if a run has locked it."""
    # struct flock: type, whence, start, length (0: the whole file), pid.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))


def _refused(path: Path, fd: int, error: OSError, who: str, first: str) -> Busy | ConfigurationError:
    holder = os.pread(fd, 200, 0).decode("utf-8", "replace").split()
    os.close(fd)
    if error.errno not in _TAKEN:
        return ConfigurationError(
            f"{path} cannot be locked: {error.strerror}",
            fix="put the file on a local file system that supports flock and fcntl locks",
        )
    described = "a process that has not written its name yet"
    if len(holder) == 3:
        described = f"process {holder[1]} on {holder[0]}, since {holder[2]}"
    return Busy(
        f"{who} {path}: {described}", fix=f"{first}; a SQLite file has one worker, several need PostgreSQL"
    )


BUSY_SECONDS = 10.0
STATEMENT_DEADLINE = 10.0

# Seconds until a session that leaves its transaction open loses its locks and its snapshot.
IDLE = 5.0

# A peer that vanishes is noticed within about five seconds.
_KEEPALIVES = {
    "connect_timeout": "3",
    "keepalives": "1",
    "keepalives_idle": "3",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "tcp_user_timeout": "5000",
}
_SESSION = {"timezone": "UTC", "jit": "off"}
# The worker's own statements all use indexes. The planner must not scan a table because it was
# empty when it was last analysed. A statement that the worker has given up must not keep its locks.
_WORKER_SESSION = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_memoize": "off",
    "statement_timeout": f"{STATEMENT_DEADLINE + 5:g}s",
}


def read_url(url: str, *, setting: str = "database.url") -> URL:
    """The URL of a SQLite file or of a PostgreSQL database, with the driver named.

    `setting` is its source, for errors; they never quote the URL, since it may hold a password.

    Raises:
        ConfigurationError: it names neither, has an @ that may belong to the password, or names
            PostgreSQL without the extra installed.
    """
    fix = f"{setting} is sqlite:///FILE or postgresql://USER@HOST/NAME"
    if not url.startswith("sqlite") and url.partition("?")[0].count("@") > 1:
        # The driver would take what follows the first @ for the host, and show it in errors.
        raise ConfigurationError(
            f"{setting} has more than one @ before its parameters",
            fix="write @ as %40 in user, password and name of the database, and / as %2F, : as %3A, % as %25",
        )
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"{setting} cannot be read", fix=fix) from None
    kind = parsed.drivername.partition("+")[0]
    if kind in ("postgres", "postgresql"):
        if importlib.util.find_spec("psycopg") is None:
            raise ConfigurationError(
                f"{setting} names PostgreSQL, and its driver is not installed",
                fix="install orgworker with its extra postgresql (the documentation's page Install)",
            )
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise ConfigurationError(f"{setting} names {kind}, which is not supported", fix=fix)
    if not parsed.database or parsed.database == ":memory:" or parsed.host or parsed.username:
        raise ConfigurationError(f"{setting} does not name a SQLite file", fix=fix)
    return parsed.set(drivername="sqlite")


def make_folder(folder: Path) -> None:
    """Make a folder for database and state, open to its owner only; an existing one keeps its mode."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def open_engine(
    url: URL, *, clock: Clock, role: str, connections: int, deadline: float, idle: float = IDLE
) -> Engine:
    """The engine of a URL from `read_url`; it keeps `connections` open.

    PostgreSQL ends a session that leaves its transaction open for `idle` seconds.
    """
    if url.get_backend_name() == "sqlite":
        return _open_sqlite(url, clock=clock, connections=connections)
    arguments = libpq_arguments(url, role=role, idle=idle)
    return _open_postgresql(url, arguments, connections=connections, deadline=deadline)


def _open_sqlite(url: URL, *, clock: Clock, connections: int) -> Engine:
    file = Path(url.database or "")
    try:
        make_folder(file.parent)
    except OSError as error:
        raise ConfigurationError(
            f"{file.parent}, the folder of the database, cannot be made: {error.strerror}",
            fix="database.url must name a file where this user may write",
        ) from error
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=10,
        # The most recently used one first: a write by another connection empties a page cache.
        pool_use_lifo=True,
        pool_timeout=BUSY_SECONDS,
        json_serializer=compact_json,
        connect_args={
            "timeout": BUSY_SECONDS,
            "check_same_thread": False,
            "cached_statements": 512,
            # The driver must not open transactions itself: its BEGIN is deferred.
            "isolation_level": None,
        },
    )

    @event.listens_for(engine, "do_connect")
    def create(*_: Any) -> None:
        # SQLite would follow the umask; -wal, -shm and -journal take the mode of this file.
        # An existing file is not opened here: closing it would drop the locks of this process.
        with suppress(OSError):
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        record.info[CLOCK] = clock
        if sys.version_info >= (3, 12):
            # The plans of the hot statements are fixed, whatever values are bound.
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_QPSG)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "wal_autocheckpoint = 20000",
            "foreign_keys = ON",
            "cache_size = -65536",
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred BEGIN that turns into a write fails at once, whatever the busy timeout.
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def libpq_arguments(url: URL, *, role: str, idle: float = IDLE) -> dict[str, str]:
    """The libpq arguments of a PostgreSQL URL with our defaults; the URL takes precedence."""
    session = _SESSION | {"idle_in_transaction_session_timeout": f"{idle * 1000:.0f}ms"}
    session |= _WORKER_SESSION if role == "worker" else {}
    options = " ".join(f"-c {name}={value}" for name, value in session.items())
    given = dict(url.query)
    place = {
        "host": url.host,
        "port": url.port,
        "user": url.username,
        "password": url.password,
        "dbname": url.database,
    }
    return (
        {"application_name": f"orgworker {role}"}
        | _KEEPALIVES
        | {name: str(value) for name, value in given.items()}
        | {"options": f"{options} {given.get('options', '')}".strip()}
        | {name: str(value) for name, value in place.items() if value}
    )


def _open_postgresql(url: URL, arguments: Mapping[str, str], *, connections: int, deadline: float) -> Engine:
    from worker.store.sessions import connect

    engine = create_engine(
        url,
        creator=lambda: connect(arguments, deadline=deadline),
        pool_size=connections,
        max_overflow=10,
        pool_timeout=5,
        json_serializer=compact_json,
        use_native_hstore=False,
    )

    @event.listens_for(engine, "checkout")
    def discard_ended(connection: Any, record: Any, proxy: Any) -> None:
        # An idle session is readable only if it has ended. After a restart of the server
        # the first query then gets a new session, not a broken one.
        if connection.closed or select.select([connection.fileno()], [], [], 0)[0]:
            raise InvalidatePoolError

    return engine
