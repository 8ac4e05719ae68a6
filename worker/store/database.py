"""Database: connections, transactions, the threads that run them, and whether the database answers."""

from __future__ import annotations

import asyncio
import copy
import functools
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, TimeoutError

from worker.clock import Clock
from worker.errors import StoreUnavailable
from worker.store import roles
from worker.store.dialect import database_now, driver, hint
from worker.store.engine import (
    BUSY_SECONDS,
    IDLE,
    STATEMENT_DEADLINE,
    libpq_arguments,
    lock_beside,
    open_engine,
    read_url,
)
from worker.telemetry.connectivity import Connectivity
from worker.telemetry.events import emit
from worker.telemetry.masking import shown_url

# The first half of the keys of advisory locks by name.
_EXCLUSIVE = 6_070_312
_TRY_LOCK = text("SELECT pg_try_advisory_lock(:kind, hashtext(:name))")
_UNLOCK = text("SELECT pg_advisory_unlock(:kind, hashtext(:name))")


Dialect = Literal["sqlite", "postgresql"]
P = ParamSpec("P")
T = TypeVar("T")

# SQLite's primary result codes for errors that the statement did not cause: busy, locked,
# out of memory, read only, I/O error, full, cannot open, lock protocol.
_TRANSIENT = frozenset({5, 6, 7, 8, 10, 13, 14, 15})


class Database:
    """One SQLite file or PostgreSQL database.

    `transaction` and `autocommit` run in the calling thread; `run`, `call` and `call_autocommit`
    in the database's own threads: one writer on SQLite, a few on PostgreSQL.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock,
        threads: int,
        connectivity: Connectivity,
        own_reads: bool = False,
        idle: float = IDLE,
    ) -> None:
        self._engine = engine
        self._idle = idle
        self._clock = clock
        self._connectivity = connectivity
        self._scope: roles.Scope | None = None
        self._open: Connection | None = None
        self.dialect: Dialect = "sqlite" if engine.dialect.name == "sqlite" else "postgresql"
        self.url_shown = shown_url(engine.url.render_as_string(hide_password=False))
        self._threads = ThreadPoolExecutor(
            1 if self.dialect == "sqlite" else threads, thread_name_prefix="database"
        )
        # What an attempt needs is read while others wait for the lock of admission, or write.
        self._reads = self._threads
        if own_reads and self.dialect == "postgresql":
            self._reads = ThreadPoolExecutor(1, thread_name_prefix="database reads")
        # Writers of this process queue here, in order: SQLite's busy handler polls.
        self._writer = threading.Lock() if self.dialect == "sqlite" else None
        self._with_deadline: dict[float, Database] = {}

    @classmethod
    def open(
        cls,
        url: str,
        *,
        clock: Clock,
        role: str = "worker",
        threads: int = 2,
        deadline: float = STATEMENT_DEADLINE,
        own_reads: bool = False,
        idle: float = IDLE,
    ) -> Database:
        """A database by its URL; it connects at the first query.

        On PostgreSQL `role` names the sessions, and `deadline`, in seconds, bounds each statement; with
        `own_reads`, `call_autocommit` has a thread of its own there. A transaction that is left open for
        `idle` seconds, as by a worker that is cut off, loses its locks.

        Raises:
            ConfigurationError: the URL does not name a supported database.
        """
        parsed = read_url(url)
        # A server's sessions are limited: one pooled connection per thread.
        kept = threads + (2 if parsed.get_backend_name() == "sqlite" else own_reads)
        engine = open_engine(parsed, clock=clock, role=role, connections=kept, deadline=deadline, idle=idle)
        # Other parts of this process see the same outage: only the worker reports it.
        reports = role == "worker"
        connectivity = Connectivity(
            clock,
            on_lost=_report_lost if reports else _silent,
            on_back=_report_back if reports else _silent,
        )
        return cls(
            engine,
            clock=clock,
            threads=threads,
            connectivity=connectivity,
            own_reads=own_reads,
            idle=idle,
        )

    def with_deadline(self, deadline: float) -> Database:
        """The same database over a connection of its own, with at most this deadline, in seconds.

        For work that must notice an outage soon; closed with this database. On SQLite it is this
        database itself: its writers share one queue.
        """
        if self.dialect == "sqlite":
            return self
        deadline = min(deadline, STATEMENT_DEADLINE)
        if deadline not in self._with_deadline:
            engine = open_engine(
                self._engine.url,
                clock=self._clock,
                role="worker",
                connections=1,
                deadline=deadline,
                idle=self._idle,
            )
            self._with_deadline[deadline] = Database(
                engine, clock=self._clock, threads=1, connectivity=self._connectivity
            )
        other = self._with_deadline[deadline]
        return other if self._scope is None else other.acting(self._scope)

    def acting(self, scope: roles.Scope) -> Database:
        """This database for a caller: on PostgreSQL every statement runs in the scope's role, for its org.

        It shares connections and threads with this one, which closes them. SQLite has no roles:
        there only the org that the store's functions get separates the rows.
        """
        view = copy.copy(self)
        view._scope = scope
        return view

    def within(self, connection: Connection) -> Database:
        """This database for operations that are part of a transaction that is open on this connection.

        Their `transaction` and `autocommit` begin and end nothing.
        """
        view = copy.copy(self)
        view._open = connection
        return view

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction: BEGIN IMMEDIATE on SQLite, READ COMMITTED on PostgreSQL.

        Raises:
            StoreUnavailable: the database did not answer, or refused the connection.
            RolesMissing: the login may not take the role of this scope.
        """
        if self._open is not None:
            yield self._open
            return
        with self._write_lock(), self._reporting(), self._connection() as connection, connection.begin():
            if self._scope is not None and self.dialect == "postgresql":
                roles.act(connection, self._scope)
            yield connection

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """For reads and single statements, each its own transaction; one for all in a scope's role.

        Raises:
            StoreUnavailable, RolesMissing: as in `transaction`.
        """
        if self._open is not None:
            yield self._open
            return
        if self._scope is not None and self.dialect == "postgresql":
            # A role lasts as long as its transaction; without one, as long as the session.
            with self.transaction() as connection:
                yield connection
            return
        with self._reporting(), self._connection() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def exclusively(self, *names: str) -> Iterator[bool]:
        """Hold locks of this database until the block ends or this process dies.

        Yields False, without waiting, if another process holds the lock of one of these names. On
        PostgreSQL they are advisory locks of a session of its own, on SQLite files beside the database.
        """
        with ExitStack() as stack:
            if self.dialect == "sqlite":
                locks = (lock_beside(self._engine.url, name) for name in names)
                yield all(lock is not None and stack.callback(lock.release) for lock in locks)
                return
            stack.enter_context(translated())
            session = stack.enter_context(self._engine.connect()).execution_options(
                isolation_level="AUTOCOMMIT"
            )

            def take(name: str) -> bool:
                key = {"kind": _EXCLUSIVE, "name": name}
                if held := bool(session.execute(_TRY_LOCK, key).scalar_one()):
                    stack.callback(session.execute, _UNLOCK, key)
                return held

            yield all(map(take, names))

    def now(self, connection: Connection) -> datetime:
        """The time that rows are compared with: PostgreSQL's clock, or the injected one."""
        return database_now(connection)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in a thread of the database; it opens its own transactions."""
        return await self._in(self._threads, functools.partial(work, *args, **kwargs))

    async def call(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` in one transaction, in a thread of the database.

        Cancelling the caller does not undo it: the transaction still commits or fails.
        """

        def in_transaction() -> T:
            with self.transaction() as connection:
                return work(connection, *args, **kwargs)

        return await self.run(in_transaction)

    async def call_autocommit(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` on a connection in autocommit mode, in a thread of the database."""

        def in_autocommit() -> T:
            with self.autocommit() as connection:
                return work(connection, *args, **kwargs)

        return await self._in(self._reads, in_autocommit)

    @staticmethod
    async def _in(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def listen(self, on_hint: Callable[[], None]) -> None:
        """Call `on_hint` at each hint, on PostgreSQL; see `dialect.hint`."""
        if self.dialect == "postgresql":
            from worker.store.sessions import listen

            await listen(libpq_arguments(self._engine.url, role="listener"), self._clock, on_hint)
        await asyncio.Event().wait()

    async def hint(self) -> None:
        """Wake every worker now."""
        await self.call_autocommit(hint)

    def close(self) -> None:
        """Wait for the work in the threads, then close every connection."""
        for threads in (self._threads, self._reads):
            threads.shutdown(wait=True, cancel_futures=True)
        self._engine.dispose()
        for other in self._with_deadline.values():
            other.close()

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        if self._writer is None:
            yield
            return
        if not self._writer.acquire(timeout=BUSY_SECONDS):
            raise StoreUnavailable(f"{self.url_shown} was busy for {BUSY_SECONDS:g} s")
        try:
            yield
        finally:
            self._writer.release()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        started_at = self._connectivity.started()
        try:
            with translated():
                yield
        except StoreUnavailable as error:
            self._connectivity.failed(error.message, started_at)
            raise
        self._connectivity.answered(started_at)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            try:
                yield connection
            except BaseException:
                # The hot statements bypass SQLAlchemy, which then does not see that the session died.
                # (An invalidated connection would connect again if asked for its driver.)
                if not connection.invalidated and getattr(driver(connection), "closed", False):
                    connection.invalidate()
                raise


def in_transaction(
    work: Callable[Concatenate[Connection, P], T],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """A method, of a class with a `database`, that does this work in one transaction, in a thread."""

    @functools.wraps(work)
    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await cast(Database, self.database).call(work, *args, **kwargs)

    return method


def in_autocommit(
    work: Callable[Concatenate[Connection, P], T],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The same on a connection in autocommit mode."""

    @functools.wraps(work)
    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await cast(Database, self.database).call_autocommit(work, *args, **kwargs)

    return method


@contextmanager
def translated() -> Iterator[None]:
    """Turn a driver's error about an absent or overloaded database into `StoreUnavailable`."""
    try:
        yield
    except TimeoutError as error:
        raise StoreUnavailable("no connection to the database became free in time") from error
    except DBAPIError as error:
        if error.orig is not None and (error.connection_invalidated or is_transient(error.orig)):
            raise _unavailable(error.orig) from error
        raise
    except Exception as error:
        if is_transient(error):
            raise _unavailable(error) from error
        raise


def is_transient(error: BaseException) -> bool:
    """Whether the database, and not the statement, caused a driver's error."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 1) & 0xFF in _TRANSIENT
    # By name: psycopg is not installed where only SQLite is used.
    return any(
        kind.__module__.startswith("psycopg") and kind.__name__ in ("OperationalError", "InterfaceError")
        for kind in type(error).__mro__
    )


# What SQLite's codes mean and how to fix it; a file has no server that could be down.
_SQLITE_FAULTS: dict[int, tuple[str, str]] = {
    sqlite3.SQLITE_BUSY: (
        "the database is locked",
        "another process has been writing for too long: `fuser -v FILE` shows which; end it, or try again",
    ),
    sqlite3.SQLITE_READONLY: (
        "the database file is read-only for this user",
        "run the command as the worker's user, or let this user write the file of database.url, its -wal and "
        "-shm files and their folder (`ls -la`); check that the file system is not mounted read-only",
    ),
    sqlite3.SQLITE_IOERR: ("the disk fails", "look for disk errors in the log of the kernel (`dmesg`)"),
    sqlite3.SQLITE_FULL: ("the disk is full", "make room on the file system of database.url"),
    sqlite3.SQLITE_CANTOPEN: (
        "the database file cannot be opened",
        "let this user read and write the file of database.url and its folder (`ls -la`), and check the path",
    ),
}
_SQLITE_FAULTS[sqlite3.SQLITE_LOCKED] = _SQLITE_FAULTS[sqlite3.SQLITE_BUSY]


def _unavailable(error: BaseException) -> StoreUnavailable:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    what = "the database did not answer"
    fix = "is it running, and does database.url in worker.toml name it?"
    if isinstance(error, sqlite3.Error):
        fault = _SQLITE_FAULTS.get(getattr(error, "sqlite_errorcode", 1) & 0xFF)
        what, fix = fault or (what, "does database.url in worker.toml name a file that works?")
    return StoreUnavailable(f"{what}: {reason}", fix=fix)


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Keys that a batch loader reads in one query.
BATCH = 500


class BatchLoader(Generic[K, V]):
    """Reads by key, all keys asked for at the same time in one query.

    `read` returns the values that exist; the others are None. Keys that come within `linger`
    seconds after a query share the next one. A value answers for `keep` seconds after its query.
    """

    def __init__(
        self,
        read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]],
        *,
        linger: float = 0.0,
        keep: float = 0.0,
    ) -> None:
        self._read = read
        self._linger = linger
        self._keep = keep
        # Until when, by the time of the loop, and the value.
        self._kept: dict[K, tuple[float, V]] = {}
        self._waiting: dict[K, list[asyncio.Future[V | None]]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def of(self, key: K) -> V | None:
        """The value of one key; raises what `read` raises."""
        loop = asyncio.get_running_loop()
        if (kept := self._kept.get(key)) is not None and loop.time() < kept[0]:
            return kept[1]
        answer: asyncio.Future[V | None] = loop.create_future()
        self._waiting.setdefault(key, []).append(answer)
        if self._reading is None:
            self._reading = loop.create_task(self._read_all())
        return await answer

    async def _read_all(self) -> None:
        try:
            while keys := list(self._waiting)[:BATCH]:
                # Several callers may wait for one key, each with its own future: one may be cancelled.
                answers = [(key, answer) for key in keys for answer in self._waiting.pop(key)]
                try:
                    found = await self._read(keys)
                except Exception as error:
                    for _, answer in answers:
                        if not answer.done():
                            answer.set_exception(error)
                            # Mark it as retrieved, in case no caller waits any more.
                            answer.exception()
                else:
                    if self._keep:
                        now = asyncio.get_running_loop().time()
                        kept = {key: one for key, one in self._kept.items() if now < one[0]}
                        self._kept = kept | {key: (now + self._keep, value) for key, value in found.items()}
                    for key, answer in answers:
                        if not answer.done():
                            answer.set_result(found.get(key))
                if self._linger:
                    await asyncio.sleep(self._linger)
        finally:
            self._reading = None


def _report_lost(error: str) -> None:
    emit("database.lost", error=error)


def _report_back(seconds: float) -> None:
    emit("database.back", seconds=seconds)


def _silent(_: object) -> None:
    return None
