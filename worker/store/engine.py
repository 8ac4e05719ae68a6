"""Engines: safe SQLAlchemy settings for each dialect, and the lock beside a SQLite file."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import select
import socket
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.types.string import TextLoader
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidatePoolError

from worker.clock import Clock, SystemClock, to_text
from worker.errors import Busy, ConfigurationError
from worker.store.connection import CLOCK

T = TypeVar("T")

_NOTHING_READY = 0


class DeadlineConnection(psycopg.Connection[Any]):
    """Every wait on the network, COMMIT's included, ends within `deadline` seconds."""

    deadline: float = 10.0

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        try:
            return super().wait(_bounded(gen, self.deadline), *arguments, **options)
        except _DeadlinePassed:
            self.pgconn.finish()
            raise psycopg.OperationalError(
                f"the database did not answer within {self.deadline:g} s; the connection is closed"
            ) from None


class _DeadlinePassed(Exception):
    """The generator of a wait has had its time."""


def _bounded(gen: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    until = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            # An answer that is there is taken, however late: this process may have been stopped.
            if ready == _NOTHING_READY and time.monotonic() >= until:
                raise _DeadlinePassed
            wanted = gen.send(ready)
    except StopIteration as end:
        value: T = end.value
        return value


def connect(arguments: Mapping[str, str], *, deadline: float) -> DeadlineConnection:
    """A connection with libpq's arguments, on which identifiers come as text."""
    connection = DeadlineConnection.connect(make_conninfo(**arguments))
    connection.deadline = deadline
    connection.adapters.register_loader("uuid", TextLoader)
    return connection


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


BUSY_SECONDS = 10.0
STATEMENT_DEADLINE = 10.0

# A peer that vanishes is noticed within about five seconds; a session that forgets its
# transaction does not keep its locks and its snapshot.
_KEEPALIVES = {
    "connect_timeout": "3",
    "keepalives": "1",
    "keepalives_idle": "3",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "tcp_user_timeout": "5000",
}
_SESSION = {
    "timezone": "UTC",
    "jit": "off",
    "idle_in_transaction_session_timeout": "5s",
}
# The worker's own statements all go by index. The planner must not think a table
# small, and scan it, because it was empty when it was last analysed.
# A statement that this side has given up must not keep its locks over there.
_WORKER_SESSION = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_memoize": "off",
    "statement_timeout": f"{STATEMENT_DEADLINE + 5:g}s",
}

# One form of JSON for all that writes it, so that its text can be compared on SQLite.
compact_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# The claims and flags of one token stand in thousands of attempts: their text is made once.
SHARED = 4096
_shared: dict[int, tuple[Any, str]] = {}


def shared_json(value: Any) -> str:
    """As `compact_json`, for a value that is the same object again and again and never changes."""
    known = _shared.get(id(value))
    if known is None or known[0] is not value:
        known = _shared[id(value)] = (value, compact_json(value))
        if len(_shared) > SHARED:
            _shared.pop(next(iter(_shared)), None)
    return known[1]


def read_url(url: str, *, setting: str = "database.url") -> URL:
    """The URL of a SQLite file or of a PostgreSQL database, with the driver named.

    `setting` is where it comes from, for errors; they never quote it, since it may hold a password.

    Raises:
        ConfigurationError: it names neither, has an @ that may belong to the password, or names
            PostgreSQL without the extra installed.
    """
    fix = f"{setting} is sqlite:///FILE or postgresql://USER@HOST/NAME"
    if not url.startswith("sqlite") and url.partition("?")[0].count("@") > 1:
        # The driver would take what follows the first @ for the host, and name it in errors.
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
                fix="pip install 'orgworker[postgresql]'",
            )
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise ConfigurationError(f"{setting} names {kind}, which is not supported", fix=fix)
    if not parsed.database or parsed.database == ":memory:" or parsed.host or parsed.username:
        raise ConfigurationError(f"{setting} names no SQLite file", fix=fix)
    return parsed.set(drivername="sqlite")


def make_folder(folder: Path) -> None:
    """Make a folder for database and state, open to its owner only; one that is there keeps its mode."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def open_engine(url: URL, *, clock: Clock, role: str, connections: int, deadline: float) -> Engine:
    """The engine of a URL from `read_url`, with room for so many connections at once."""
    if url.get_backend_name() == "sqlite":
        return _open_sqlite(url, clock=clock, connections=connections)
    return _open_postgresql(url, role=role, connections=connections, deadline=deadline)


def _open_sqlite(url: URL, *, clock: Clock, connections: int) -> Engine:
    file = Path(url.database or "")
    folder = file.parent
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigurationError(
            f"{folder}, the folder of the database, cannot be made: {error.strerror}",
            fix="database.url must name a file where this user may write",
        ) from error
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=10,
        # The last one used again: what another has written empties a connection's cache of pages.
        pool_use_lifo=True,
        pool_timeout=BUSY_SECONDS,
        json_serializer=compact_json,
        connect_args={
            "timeout": BUSY_SECONDS,
            "check_same_thread": False,
            "cached_statements": 512,
            # The driver must not open transactions of its own: its BEGIN is deferred.
            "isolation_level": None,
        },
    )

    @event.listens_for(engine, "do_connect")
    def create(*_: Any) -> None:
        # SQLite would make it as the umask has it; -wal, -shm and -journal take the mode of this file.
        # One that is there is not opened here: to close it again would drop the locks of this process.
        with suppress(OSError):
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        record.info[CLOCK] = clock
        if sys.version_info >= (3, 12):
            # The plans of the hot statements are fixed: no value that is bound may ask for another.
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


def libpq_arguments(url: URL, *, role: str) -> dict[str, str]:
    """What a PostgreSQL URL and our defaults make of a connection; what stands in the URL wins."""
    session = _SESSION | (_WORKER_SESSION if role == "worker" else {})
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


def _open_postgresql(url: URL, *, role: str, connections: int, deadline: float) -> Engine:
    pass

    arguments = libpq_arguments(url, role=role)
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
    def look(connection: Any, record: Any, proxy: Any) -> None:
        # A session that rests has nothing to say but that it has ended: after a restart of
        # the server the first question then finds a new session, not a broken one.
        if connection.closed or select.select([connection.fileno()], [], [], 0)[0]:
            raise InvalidatePoolError

    return engine
