"""The database under simulation: real statements, each with three points where the world may change.

A statement is sent, carried out, answered. At each point its thread parks, so that its worker may be killed,
frozen or cut off there. On PostgreSQL every statement has these points, and one that waits for a lock parks
until others let it go on. On SQLite a whole transaction has them: its writers stand in one queue.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psycopg
from psycopg import pq, waiting

from tests.simulation.loop import SeededLoop, SimulatedProcess, Stuck, Thread, outside, process_now
from tests.simulation.network import Net
from worker.errors import StoreUnavailable
from worker.store import database as product
from worker.store import sessions

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
# Virtual seconds between two looks of a statement that waits: for a lock, or for the network.
LOOK = 0.5
# How much later than an answer a notification may arrive.
HINT = 0.5
# Virtual seconds until the server ends a statement whose client has given it up.
LEFT = 5.0
# Real seconds: for an answer before the server is asked whether the session waits for a lock, and in all.
ANSWER = 0.002
ALL = 20.0
SCHEMA = "simulation"
# The time of the server is in a file: a statement sees it at once, in whatever transaction it is.
PREPARE = f"""
CREATE SCHEMA IF NOT EXISTS {SCHEMA};
CREATE OR REPLACE FUNCTION {SCHEMA}.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
$$ SELECT timestamptz '{EPOCH.isoformat()}' + pg_read_file('%s')::bigint * interval '1 microsecond' $$
"""
SEARCH_PATH = f"{SCHEMA}, pg_catalog, public"
# Time and chance of the functions of a product, which run as a role that may not read the file.
PREPARE_STARTS = f"""
CREATE SCHEMA IF NOT EXISTS {SCHEMA}_starts;
GRANT USAGE ON SCHEMA {SCHEMA}_starts TO PUBLIC;
CREATE SEQUENCE IF NOT EXISTS {SCHEMA}_starts.numbers;
CREATE OR REPLACE FUNCTION {SCHEMA}_starts.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
SECURITY DEFINER AS $$ SELECT {SCHEMA}.clock_timestamp() $$;
CREATE OR REPLACE FUNCTION {SCHEMA}_starts.gen_random_uuid() RETURNS uuid LANGUAGE sql VOLATILE
SECURITY DEFINER AS $$ SELECT md5(nextval('{SCHEMA}_starts.numbers')::text)::uuid $$;
ALTER FUNCTION public.orgworker_start_many(jsonb) SET search_path = {SCHEMA}_starts, pg_catalog, pg_temp;
INSERT INTO public.product_logins (id, login, created_at, created_by)
VALUES (gen_random_uuid(), session_user, now(), 'simulation')
"""
# The process of the product, for which nothing of ours may wait.
PRODUCT = "product"
# Digits of the microseconds in that file.
DIGITS = 18


class Points:
    """The points of the calls of the database of one simulation."""

    def __init__(self, loop: SeededLoop, net: Net) -> None:
        self.loop = loop
        self.net = net
        # Called after each commit.
        self.on_commit: Callable[[], None] = lambda: None

    def sent(self, process: SimulatedProcess, thread: Thread, deadline: float, *, first: bool = True) -> bool:
        """A call is on its way; returns whether it arrived before the caller's deadline.

        Unless it is the `first` of a transaction, the answer before it has taken its time just now.
        """
        self.net.reached(process, "db.sent")
        if not first and process.alive and not process.frozen and not self.net.away(process, "database"):
            return True
        return self._pass(process, thread, deadline)

    def carried_out(self, process: SimulatedProcess, thread: Thread, deadline: float) -> bool:
        """The answer is on its way; returns whether it arrived."""
        if self.net.reached(process, "db.done"):
            self.loop.note(process, "an answer is lost")
            thread.park(self.loop.delay())
            return False
        return self._pass(process, thread, deadline)

    def _pass(self, process: SimulatedProcess, thread: Thread, deadline: float) -> bool:
        thread.park(self.loop.delay())
        while (away := self.net.away(process, "database")) > 0:
            left = deadline - self.loop.time()
            if left <= 0:
                return False
            thread.park(min(away, left) + self.loop.delay())
        return True


class SqliteFile(Points):
    """Each transaction, and each connection in autocommit mode, has the points."""

    @contextmanager
    def simulated(self) -> Iterator[None]:
        with (
            patch.object(product.Database, "transaction", self._with_points("transaction")),
            patch.object(product.Database, "autocommit", self._with_points("autocommit")),
        ):
            yield

    def _with_points(self, name: str) -> Any:
        real, points = getattr(product.Database, name), self

        @contextmanager
        def call(database: Any) -> Iterator[Any]:
            thread, process = Thread.current(), process_now()
            if thread is None or process is None:
                with real(database) as connection:
                    yield connection
                return
            deadline = points.loop.time() + product.BUSY_SECONDS
            if not points.sent(process, thread, deadline):
                raise StoreUnavailable("the file does not answer")
            with real(database) as connection:
                yield connection
            points.loop.note(process, name)
            points.on_commit()
            if not points.carried_out(process, thread, deadline):
                raise StoreUnavailable("the disk fails")

        return call


class Session:
    """A session of a process, from the server's side."""

    def __init__(self, connection: Any, process: SimulatedProcess, number: int) -> None:
        self.number = number
        self.connection = connection
        self.process = process
        self.fileno: int = connection.fileno()
        self.pid: int = connection.info.backend_pid
        self.idle_since: float | None = None
        # The thread whose statement waits for a lock.
        self.waits: Thread | None = None
        self.flags = 0
        # The pids of those it waits for.
        self.blockers: set[int] = set()

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Listener:
    """A process that listens; what it was not told yet is told at once."""

    def __init__(self, process: SimulatedProcess, on_hint: Callable[[], None]) -> None:
        self.process = process
        self.is_told = False
        self._on_hint = on_hint

    def tell(self) -> None:
        self.is_told = False
        self._on_hint()


class PostgresServer(Points):
    """One statement at a time is carried out, on the real server."""

    def __init__(self, loop: SeededLoop, net: Net, url: str, *, idle: float) -> None:
        super().__init__(loop, net)
        self._idle = idle
        self._control = psycopg.connect(url, autocommit=True)
        handle, self._time_file = tempfile.mkstemp(prefix="simulated-time-", dir="/dev/shm")
        os.fchmod(handle, 0o644)
        self._time = handle
        self._tell_time()
        for statement in (PREPARE % self._time_file + ";\n" + PREPARE_STARTS).split(";\n"):
            self._control.execute(statement.encode())
        self._sessions: dict[int, Session] = {}
        # Those whose clients have gone while they waited for a lock.
        self._left: list[Session] = []
        self._numbers = itertools.count(1)
        self.listeners: list[Listener] = []
        self._real_wait = waiting.wait

    @contextmanager
    def simulated(self) -> Iterator[None]:
        clock = SimpleNamespace(monotonic=self.loop.time)
        with (
            patch.object(waiting, "wait", self._wait),
            patch.object(sessions, "time", clock),
            patch.object(sessions, "connect", self._connecting(sessions.connect)),
            patch.object(sessions.DeadlineConnection, "close", self._closing(psycopg.Connection.close)),
            patch.object(sessions, "listen", self._listen),
            patch.object(product, "hint", self._hint),
            # A pipeline returns while the server still works at what it was sent.
            patch.object(psycopg.Connection, "pipeline", _no_pipeline),
            patch.object(psycopg.Pipeline, "is_supported", lambda: False),
        ):
            yield
        for session in (*self._sessions.values(), *self._left):
            session.signal(signal.SIGCONT)
        self._control.close()
        os.close(self._time)
        os.unlink(self._time_file)

    def end_sessions(self, process: SimulatedProcess) -> None:
        """The sockets of a process that was killed are closed, and the server has noticed."""
        for number, session in list(self._sessions.items()):
            if session.process is process:
                del self._sessions[number]
                self._terminate(session)

    def _tell_time(self) -> None:
        os.pwrite(self._time, f"{int(self.loop.time() * 1_000_000):0{DIGITS}}".encode(), 0)

    def _terminate(self, session: Session) -> None:
        session.signal(signal.SIGCONT)
        self._execute("SELECT pg_terminate_backend(%s, 5000)", session.pid)
        session.idle_since = None
        self._look_at_locks(session)

    def _execute(self, statement: str, *values: object) -> Any:
        with patch.object(waiting, "wait", self._real_wait):
            return self._control.execute(statement.encode(), values or None).fetchone()

    def _connecting(self, connect: Callable[..., Any]) -> Callable[..., Any]:
        def connected(arguments: Any, *, deadline: float) -> Any:
            thread, process = Thread.current(), process_now()
            if thread is not None and process is not None:
                until = self.loop.time() + 3.0  # connect_timeout
                if not self._pass(process, thread, until):
                    raise psycopg.OperationalError("the server does not answer")
            with patch.object(waiting, "wait", self._real_wait):
                connection = connect(arguments, deadline=deadline)
            if process is not None:
                connection.prepare_threshold = 0
                session = Session(connection, process, next(self._numbers))
                self._sessions[session.fileno] = session
            return connection

        return connected

    def _wait(self, gen: Any, fileno: int, interval: float = 0.0, timeout: float | None = None) -> Any:
        thread, session = Thread.current(), self._sessions.get(fileno)
        if thread is None or session is None or _says_nothing(gen, session):
            return self._real_wait(gen, fileno, interval=interval)
        process, session.idle_since = session.process, None
        self.loop.note(process, f"statement by {session.number}")
        deadline = self.loop.time() + session.connection.deadline
        idle = session.connection.pgconn.transaction_status == pq.TransactionStatus.IDLE
        if not self.sent(process, thread, deadline, first=idle):
            self._close(session)
            raise sessions._DeadlinePassed
        result = self._carry_out(gen, fileno, session, thread)
        if not self.carried_out(process, thread, deadline):
            self._close(session)
            if self.loop.time() >= deadline:
                raise sessions._DeadlinePassed
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return result

    def _closing(self, close: Callable[[Any], None]) -> Callable[[Any], None]:
        def closed(connection: Any) -> None:
            session = next((s for s in self._sessions.values() if s.connection is connection), None)
            if session is not None:
                self._close(session)
            close(connection)

        return closed

    def _close(self, session: Session) -> None:
        """Its client has closed it, and the server has noticed: its locks are free."""
        self._sessions.pop(session.fileno, None)
        session.connection.pgconn.finish()
        self._terminate(session)

    def _carry_out(self, gen: Any, fileno: int, session: Session, thread: Thread) -> Any:
        self._tell_time()
        left = ALL
        try:
            wanted = next(gen)
            while True:
                ready = _ready(fileno, wanted, ANSWER)
                if ready:
                    wanted = gen.send(ready)
                    continue
                left -= ANSWER
                if left <= 0:
                    raise Stuck(f"the server has not answered for {ALL:g} s")
                if self._is_blocked(session):
                    self.loop.note(session.process, "waits for a lock")
                    self._stand_still(session)
                    session.waits, session.flags = thread, wanted
                    thread.park(LOOK)
                    while session.waits is thread:
                        # Its own deadline is compared when it is given nothing.
                        wanted = gen.send(waiting.READY_NONE)
                        thread.park(LOOK)
        except StopIteration as end:
            result = end.value
        except sessions._DeadlinePassed:
            self._leave(session)
            raise
        finally:
            self._carried_out(fileno, session)
        return result

    def _leave(self, session: Session) -> None:
        """Its client gives up a statement that waits for a lock. The server notices when it has ended."""
        del self._sessions[session.fileno]
        session.waits = None
        session.connection.pgconn.finish()
        self._left.append(session)
        self.loop.call_later(LEFT, self._end_left, session, context=outside())

    def _end_left(self, session: Session) -> None:
        """As `statement_timeout`, in virtual time."""
        if session in self._left:
            self._left.remove(session)
            self._terminate(session)

    def _carried_out(self, fileno: int, session: Session) -> None:
        pgconn = session.connection.pgconn
        if pgconn.status != pq.ConnStatus.OK:
            self._sessions.pop(fileno, None)
        elif pgconn.transaction_status != pq.TransactionStatus.IDLE:
            session.idle_since = since = self.loop.time()
            if session.process.name == PRODUCT:
                return
            self.loop.call_later(self._idle, self._end_idle, session, since, context=outside())
            return
        else:
            self.on_commit()
        # What ended may have held a lock.
        self._look_at_locks(session)

    def _end_idle(self, session: Session, since: float) -> None:
        """As `idle_in_transaction_session_timeout`, in virtual time."""
        if session.idle_since == since and session.process.alive:
            self.loop.note(session.process, "its idle session is ended")
            self._terminate(session)

    def _is_blocked(self, session: Session) -> bool:
        [pids] = self._execute("SELECT pg_blocking_pids(%s)", session.pid)
        session.blockers = set(pids)
        return bool(pids)

    def _look_at_locks(self, released: Session) -> None:
        """A session has ended its transaction: let those go on that got their locks.

        A statement that waits stands still, also when its lock is free: the server would let those that are
        woken at once race. Here one after another goes on, until it has ended or waits again.
        """
        waiting = [session for session in self._sessions.values() if session.waits is not None]
        rest = [*waiting, *self._left]
        if len(rest) > 1:
            self.loop.choices.shuffle(rest)
        free = {released.pid}
        while ended := [session for session in rest if free & session.blockers and self._has_ended(session)]:
            rest = [session for session in rest if session not in ended]
            free = {session.pid for session in ended}
        self._left = [session for session in self._left if session in rest]
        for session in waiting:
            if session not in rest and session.waits is not None:
                session.waits.wake()
                session.waits = None

    def _has_ended(self, session: Session) -> bool:
        """Whether a statement that waited for a lock has ended; if not, it waits for one again."""
        session.signal(signal.SIGCONT)
        while not (ended := self._is_over(session)):
            if self._is_blocked(session):
                self._stand_still(session)
                break
            select.select([], [], [], ANSWER)
        return ended

    def _is_over(self, session: Session) -> bool:
        if session in self._left:
            [alive] = self._execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", session.pid)
            return not alive
        return bool(_ready(session.fileno, session.flags, 0))

    def _stand_still(self, session: Session) -> None:
        """It waits for a lock, until it is told to look whether it has got it."""
        session.signal(signal.SIGSTOP)
        waits_for = {
            other.pid: other.blockers
            for other in (*self._sessions.values(), *self._left)
            if other is session or other.waits is not None or other in self._left
        }
        reached, more = set[int](), set(waits_for[session.pid])
        while more:
            reached |= more
            more = {pid for one in more for pid in waits_for.get(one, ())} - reached
        for pid in session.blockers:
            other = next((one for one in self._sessions.values() if one.pid == pid), None)
            if other is not None and other.process.name == PRODUCT != session.process.name:
                self.loop.failures.append(f"{session.process} waits for a transaction of the product")
        if session.pid in reached:
            self.loop.failures.append(f"a deadlock: {session.process} waits for itself")

    async def _listen(self, arguments: Any, clock: Any, on_hint: Callable[[], None]) -> None:
        process = process_now()
        assert process is not None
        self.listeners.append(Listener(process, on_hint))

    def _hint(self, connection: Any) -> None:
        """A notification; it may arrive late, beside others, and not at all where the network is cut."""
        self.listeners = [listener for listener in self.listeners if listener.process.alive]
        for listener in self.listeners:
            if not listener.is_told and not self.net.away(listener.process, "database"):
                listener.is_told = True
                late = self.loop.delay() + HINT * self.loop.choices.random()
                self.loop.call_later(late, listener.tell, context=listener.process.context)


def _says_nothing(gen: Any, session: Session) -> bool:
    """Whether psycopg sends nothing: it only sets an attribute, or ends a transaction that has not begun."""
    inner = gen.gi_frame.f_locals.get("gen")  # within that of the product's deadline
    name: str = getattr(inner, "__name__", "")
    idle = session.connection.pgconn.transaction_status == pq.TransactionStatus.IDLE
    return name.startswith("_set_") or (idle and name in ("_commit_gen", "_rollback_gen"))


def _ready(fileno: int, wanted: int, seconds: float) -> int:
    """Whether a socket is ready for what psycopg wants; as its `Ready`."""
    reads = [fileno] if wanted & waiting.WAIT_R else []
    writes = [fileno] if wanted & waiting.WAIT_W else []
    readable, writable, _ = select.select(reads, writes, [], seconds)
    return (waiting.READY_R if readable else 0) | (waiting.READY_W if writable else 0)


def instant(seconds: float) -> datetime:
    """The virtual time as the wall clock of the database says it."""
    return EPOCH + timedelta(seconds=seconds)


@contextmanager
def _no_pipeline(connection: Any) -> Iterator[None]:
    yield
