"""Database: connections, transactions, the threads that run them, and whether the server is reachable."""

from __future__ import annotations

import asyncio
import copy
import functools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Concatenate, Literal, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, TimeoutError

from worker.clock import Clock
from worker.errors import StoreUnavailable
from worker.store import listener, roles
from worker.store.connection import database_now, driver
from worker.store.engine import BUSY_SECONDS, STATEMENT_DEADLINE, libpq_arguments, open_engine, read_url
from worker.telemetry.events import emit
from worker.telemetry.masking import shown_url

# Seconds between two losses that are told: one of many sessions may break again and again.
QUIET = 5.0


class Connectivity:
    """Hears of every question to the database, from any thread; nothing is asked for its sake."""

    def __init__(self, clock: Clock, *, tells: bool = True) -> None:
        self._clock = clock
        self._tells = tells
        self._lock = threading.Lock()
        self._lost_at: float | None = None
        self._answered_at = float("-inf")
        self._told = False
        self._told_at = float("-inf")

    def asked(self) -> float:
        """A question begins: what `failed` and `answered` are told of it."""
        return self._clock.monotonic()

    def failed(self, error: str, asked_at: float) -> None:
        """The database did not answer a question."""
        with self._lock:
            if asked_at < self._answered_at:
                # Another question, put later, was answered: this one was put to a server that is gone.
                return
            now = self._clock.monotonic()
            if self._lost_at is None:
                self._lost_at = now
            tell = self._tells and not self._told and now - self._told_at >= QUIET
            if tell:
                self._told, self._told_at = True, now
        if tell:
            emit("database.lost", error=error)

    def answered(self, asked_at: float) -> None:
        """The database did what it was asked."""
        self._answered_at = max(self._answered_at, asked_at)
        if self._lost_at is None:
            return
        with self._lock:
            lost_at, told = self._lost_at, self._told
            self._lost_at, self._told = None, False
        if told and lost_at is not None:
            emit("database.back", seconds=round(self._clock.monotonic() - lost_at, 1))


Dialect = Literal["sqlite", "postgresql"]
P = ParamSpec("P")
T = TypeVar("T")

# SQLite's primary result codes for what is no fault of the statement: busy, locked,
# out of memory, read only, I/O error, full, cannot open, lock protocol.
_TRANSIENT = frozenset({5, 6, 7, 8, 10, 13, 14, 15})


class Database:
    """One SQLite file or PostgreSQL database.

    `transaction` and `autocommit` serve the calling thread; `call` and its kin run
    the work in the database's own threads: one writer on SQLite, a few on PostgreSQL.
    """

    def __init__(self, engine: Engine, *, clock: Clock, threads: int, contact: Connectivity) -> None:
        self._engine = engine
        self._clock = clock
        self._contact = contact
        self._scope: roles.Scope | None = None
        self.dialect: Dialect = "sqlite" if engine.dialect.name == "sqlite" else "postgresql"
        self.url_shown = shown_url(engine.url.render_as_string(hide_password=False))
        self._threads = ThreadPoolExecutor(
            1 if self.dialect == "sqlite" else threads, thread_name_prefix="database"
        )
        # Writers of this process queue here in order, not at SQLite's busy handler, which polls.
        self._writer = threading.Lock() if self.dialect == "sqlite" else None
        self._hurried: dict[float, Database] = {}

    @classmethod
    def open(
        cls,
        url: str,
        *,
        clock: Clock,
        role: str = "worker",
        threads: int = 2,
        deadline: float = STATEMENT_DEADLINE,
    ) -> Database:
        """A database by its URL; nothing is connected yet.

        `role` names the sessions on PostgreSQL; `deadline`, in seconds, bounds each
        of its statements.

        Raises:
            ConfigurationError: the URL names no database that is supported here.
        """
        parsed = read_url(url)
        # A server has so many sessions for all its clients: none stays that no thread is for.
        kept = threads + 2 if parsed.get_backend_name() == "sqlite" else threads
        engine = open_engine(parsed, clock=clock, role=role, connections=kept, deadline=deadline)
        # What else of this process asks the database finds the same, and need not tell it again.
        contact = Connectivity(clock, tells=role == "worker")
        return cls(engine, clock=clock, threads=threads, contact=contact)

    def hurried(self, deadline: float) -> Database:
        """The same PostgreSQL over a connection of its own, with this deadline if it is the shorter one.

        For work that must know soon that nobody answers; closed with this database.
        SQLite is itself: its writers stand in one line.
        """
        if self.dialect == "sqlite":
            return self
        deadline = min(deadline, STATEMENT_DEADLINE)
        if deadline not in self._hurried:
            engine = open_engine(
                self._engine.url, clock=self._clock, role="worker", connections=1, deadline=deadline
            )
            self._hurried[deadline] = Database(engine, clock=self._clock, threads=1, contact=self._contact)
        hurried = self._hurried[deadline]
        return hurried if self._scope is None else hurried.acting(self._scope)

    def acting(self, scope: roles.Scope) -> Database:
        """This database for a caller: on PostgreSQL every statement runs in the scope's role, for its org.

        It shares connections and threads with this one, which also closes them. SQLite has no
        roles: there the store's functions are given the org.
        """
        view = copy.copy(self)
        view._scope = scope
        return view

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction: BEGIN IMMEDIATE on SQLite, READ COMMITTED on PostgreSQL.

        Raises:
            StoreUnavailable: the database did not answer, or did not let us in.
            RolesMissing: the login may not take the role of this scope.
        """
        with self._turn(), self._watched(), self._connection() as connection, connection.begin():
            self._enter(connection)
            yield connection

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """For reads and single statements, each its own transaction; one for all where roles are taken.

        Raises:
            StoreUnavailable, RolesMissing: as in `transaction`.
        """
        if self._scope is not None and self.dialect == "postgresql":
            # A role is taken for a transaction: without one it would last as long as the session.
            with self.transaction() as connection:
                yield connection
            return
        with self._watched(), self._connection() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def _enter(self, connection: Connection) -> None:
        if self._scope is not None and self.dialect == "postgresql":
            roles.act(connection, self._scope)

    def now(self, connection: Connection) -> datetime:
        """The instant that rows are compared with: PostgreSQL's clock, or the injected one."""
        return database_now(connection)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in a thread of the database; it opens its own transactions."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(work, *args, **kwargs))

    async def call(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` in one transaction, in a thread of the database.

        A caller that is cancelled does not undo it: what was begun is committed or fails.
        """
        return await self.run(functools.partial(self._in_transaction, work, *args, **kwargs))

    async def call_autocommit(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` on a connection in autocommit mode, in a thread of the database."""
        return await self.run(functools.partial(self._in_autocommit, work, *args, **kwargs))

    async def listen(self, on_hint: Callable[[], None]) -> None:
        """Call `on_hint` whenever somebody hints at work; see `store.listener`."""
        if self.dialect == "postgresql":
            arguments = libpq_arguments(self._engine.url, role="listener")
            await listener.listen(arguments, self._clock, on_hint)
        await asyncio.Event().wait()

    async def hint(self) -> None:
        """Let every worker look for work now."""
        await self.call_autocommit(listener.hint)

    def close(self) -> None:
        """Wait for what runs in the threads, then close every connection."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._engine.dispose()
        for hurried in self._hurried.values():
            hurried.close()

    def _in_transaction(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with self.transaction() as connection:
            return work(connection, *args, **kwargs)

    def _in_autocommit(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with self.autocommit() as connection:
            return work(connection, *args, **kwargs)

    @contextmanager
    def _turn(self) -> Iterator[None]:
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
    def _watched(self) -> Iterator[None]:
        asked_at = self._contact.asked()
        try:
            with translated():
                yield
        except StoreUnavailable as error:
            self._contact.failed(error.message, asked_at)
            raise
        self._contact.answered(asked_at)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            try:
                yield connection
            except BaseException:
                # The hot statements go past SQLAlchemy, which so cannot see that the session died.
                # (Asking an invalidated connection for its driver would connect anew.)
                if not connection.invalidated and getattr(driver(connection), "closed", False):
                    connection.invalidate()
                raise


@contextmanager
def translated() -> Iterator[None]:
    """Turn a driver's word for an absent or overloaded database into `StoreUnavailable`."""
    try:
        yield
    except TimeoutError as error:
        raise StoreUnavailable("no connection to the database came free in time") from error
    except DBAPIError as error:
        if error.orig is not None and (error.connection_invalidated or is_transient(error.orig)):
            raise _unavailable(error.orig) from error
        raise
    except Exception as error:
        if is_transient(error):
            raise _unavailable(error) from error
        raise


def is_transient(error: BaseException) -> bool:
    """Whether a driver's error says that the database, and not the statement, was at fault."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 1) & 0xFF in _TRANSIENT
    # By name, so that SQLite alone needs no psycopg.
    return any(
        kind.__module__.startswith("psycopg") and kind.__name__ in ("OperationalError", "InterfaceError")
        for kind in type(error).__mro__
    )


def _unavailable(error: BaseException) -> StoreUnavailable:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return StoreUnavailable(
        f"the database did not answer: {reason}",
        fix="is it running, and does database.url in worker.toml name it?",
    )
