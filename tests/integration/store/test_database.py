"""Database: transactions, threads, and what an absent or hanging database looks like."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from tests.fakes import unsynced
from tests.fakes.clock import ManualClock
from tests.fakes.stock import LEASE, Stock
from worker.errors import ConfigurationError, StoreUnavailable
from worker.store import tables
from worker.store.database import Database
from worker.store.dialect import driver
from worker.store.sql import statements


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    stock = Stock(database)
    org = stock.org()
    with pytest.raises(RuntimeError), database.transaction() as connection:
        connection.execute(tables.orgs.update().values(name="changed"))
        raise RuntimeError("changed my mind")

    assert stock.all(tables.orgs, tables.orgs.c.id == org)[0]["name"] == "Acme"


def test_instants_come_back_aware_and_exact(database: Database, clock: ManualClock) -> None:
    """The test server's zone is New York; what was written in UTC is read in UTC."""
    stock = Stock(database)
    stock.org()
    (row,) = stock.all(tables.orgs)
    assert row["created_at"].utcoffset().total_seconds() == 0
    assert row["created_at"] == clock.now()


async def test_work_runs_in_a_thread_of_the_database(database: Database) -> None:
    def work(connection: Connection, factor: int) -> tuple[int, str]:
        value: int = connection.execute(text("SELECT 21")).scalar_one()
        return value * factor, threading.current_thread().name

    value, thread = await database.call(work, 2)
    again, _ = await database.call_autocommit(work, factor=3)

    assert (value, again) == (42, 63)
    assert thread.startswith("database")


def test_the_password_is_not_shown(clock: ManualClock) -> None:
    database = Database.open("postgres://ann:geheim@127.0.0.1:1/orgs", clock=clock)

    assert "geheim" not in database.url_shown
    assert "geheim" not in repr(database)
    assert database.dialect == "postgresql"
    with pytest.raises(StoreUnavailable) as caught, database.transaction():
        raise AssertionError("no connection, no transaction")
    assert "geheim" not in str(caught.value)
    database.close()


@pytest.mark.parametrize("url", ["", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "no url"])
def test_a_url_that_names_no_database_is_a_configuration_error(url: str, clock: ManualClock) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database.open(url, clock=clock)
    assert caught.value.fix


def test_a_table_that_is_missing_is_not_taken_for_an_absent_database(
    database_url: str, clock: ManualClock
) -> None:
    database = Database.open(database_url, clock=clock)
    with pytest.raises(Exception, match=r"(?i)no such table|does not exist") as caught:
        Stock(database).org()
    assert not isinstance(caught.value, StoreUnavailable)
    database.close()


def test_sqlite_writes_every_commit_through(migrated_sqlite_url: str, clock: ManualClock) -> None:
    database = Database.open(migrated_sqlite_url, clock=clock)
    with unsynced.ended(), database.autocommit() as connection:
        mode, synchronous = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        )
    database.close()
    assert (mode, synchronous) == ("wal", 2)


def test_a_second_writer_of_a_sqlite_file_waits_its_turn(
    migrated_sqlite_url: str, clock: ManualClock
) -> None:
    """A transaction takes the write lock at its start: it never fails half way."""
    one, two = (Database.open(migrated_sqlite_url, clock=clock) for _ in range(2))
    entered, order = threading.Event(), []

    def second() -> None:
        entered.wait()
        with two.transaction():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with one.transaction():
        entered.set()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    one.close()
    two.close()


def test_a_sqlite_file_that_stays_locked_is_unavailable(
    migrated_sqlite_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.store.engine.BUSY_SECONDS", 0.1)
    database = Database.open(migrated_sqlite_url, clock=clock)
    holder = sqlite3.connect(migrated_sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"), database.transaction():
        raise AssertionError("another process holds it")
    holder.close()
    with database.transaction():
        pass
    database.close()


def test_a_missing_folder_is_made_and_a_file_in_its_place_is_told(tmp_path: Path, clock: ManualClock) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/var/lib/worker.db", clock=clock)
    with database.transaction() as connection:
        connection.execute(text("CREATE TABLE t (x)"))
    database.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file"):
        Database.open(f"sqlite:///{tmp_path}/file/worker.db", clock=clock)


def test_a_statement_beyond_its_deadline_ends_with_its_connection(
    migrated_postgres_url: str, clock: ManualClock
) -> None:
    database = Database.open(migrated_postgres_url, clock=clock, deadline=0.3)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer"), database.transaction() as connection:
        connection.execute(text("SELECT pg_sleep(20)"))
    assert time.monotonic() - began < 3

    with database.autocommit() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    database.close()


def test_a_peer_that_hangs_and_still_acknowledges_is_given_up(
    migrated_postgres_url: str, clock: ManualClock
) -> None:
    with hanging_proxy(migrated_postgres_url) as (url, hang):
        database = Database.open(url, clock=clock, deadline=0.3)
        with database.autocommit() as connection:
            connection.execute(text("SELECT 1"))
        hang.set()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable), database.transaction() as connection:
            connection.execute(text("SELECT 1"))
        assert time.monotonic() - began < 3
        database.close()


def test_a_session_that_was_ended_is_replaced(postgres: Database) -> None:
    with pytest.raises(StoreUnavailable), postgres.transaction() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    Stock(postgres).org()


def test_a_hot_statement_on_a_session_that_was_ended_is_unavailable_too(postgres: Database) -> None:
    """It goes past SQLAlchemy, which so cannot see that the session died."""
    stock = Stock(postgres)
    worker = stock.worker()
    with pytest.raises(StoreUnavailable), postgres.transaction() as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with postgres.autocommit() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        statements(connection).renew(connection, worker, LEASE)

    assert stock.admit(worker) == []


def test_a_session_notices_a_peer_that_vanished_and_keeps_no_transaction_open(postgres: Database) -> None:
    with postgres.autocommit() as connection:
        used = driver(connection).info.get_parameters()
        shown = {
            name: connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("idle_in_transaction_session_timeout", "statement_timeout", "application_name")
        }

    assert {name: used[name] for name in used if "keepalive" in name or "timeout" in name} == {
        "connect_timeout": "3",
        "keepalives": "1",
        "keepalives_idle": "3",
        "keepalives_interval": "1",
        "keepalives_count": "3",
        "tcp_user_timeout": "5000",
    }
    assert shown == {
        "idle_in_transaction_session_timeout": "5s",
        # Longer than this side's own deadline: what that gave up must not keep its locks over there.
        "statement_timeout": "15s",
        "application_name": "orgworker worker",
    }


def test_a_transaction_that_is_left_open_loses_its_locks(
    migrated_postgres_url: str, postgres: Database, clock: ManualClock
) -> None:
    """As that of a worker which the network cuts off, also over the heartbeat's own connection."""
    Stock(postgres).org()
    lock = text("SELECT id FROM orgs FOR UPDATE")
    cut_off = Database.open(migrated_postgres_url, clock=clock, idle=0.3)
    locked = 0
    for database in (cut_off, cut_off.with_deadline(2.0)):
        with pytest.raises(StoreUnavailable), database.transaction() as connection:
            connection.execute(lock)
            with postgres.transaction() as other:
                other.execute(text("SET LOCAL lock_timeout = '3s'"))
                locked += len(other.execute(lock).all())
            connection.execute(text("SELECT 1"))
    cut_off.close()
    assert locked == 2


@contextmanager
def hanging_proxy(url: str) -> Iterator[tuple[str, threading.Event]]:
    """A TCP proxy before the database that, once told so, takes bytes and passes none on."""
    host, port = url.rpartition("@")[2].partition("/")[0].split(":")
    hang, sockets = threading.Event(), []
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not hang.is_set():
                    target.sendall(data)
        except OSError:
            return

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            upstream = socket.create_connection((host, int(port)))
            sockets.extend((client, upstream))
            for pair in ((client, upstream), (upstream, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield url.replace(f"{host}:{port}", f"127.0.0.1:{server.getsockname()[1]}"), hang
    finally:
        server.close()
        for each in sockets:
            each.close()
