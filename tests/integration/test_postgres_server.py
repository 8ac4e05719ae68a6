"""The PostgreSQL server that the tests make for themselves."""

from __future__ import annotations

import os
import signal

import psycopg
import pytest

from worker.store import schema


def test_each_test_gets_a_database_of_its_own(postgres_server):
    with postgres_server.new_database() as first, postgres_server.new_database() as second:
        with psycopg.connect(first) as connection:
            connection.execute("CREATE TABLE one (n int)")
        with psycopg.connect(second) as connection, pytest.raises(psycopg.errors.UndefinedTable):
            connection.execute("SELECT n FROM one")


def test_a_template_is_filled_once(postgres_server):
    filled: list[str] = []
    name = f"template_{os.getpid()}"

    for _ in range(2):
        with postgres_server.new_database(postgres_server.template(name, filled.append)):
            pass

    assert len(filled) == 1


def test_a_database_is_used_again_after_a_test_that_changed_rows_and_the_time(postgres_server, clock):
    """A new one costs 20 times as much, in each test on PostgreSQL."""
    template = postgres_server.template("migrated", schema.upgrade)
    with (
        postgres_server.new_database(template) as first,
        clock.moves(first),
        psycopg.connect(first) as connection,
    ):
        assert connection.execute("SELECT clock_timestamp()").fetchone() == (clock.now(),)
        connection.execute("DELETE FROM facts")

    with postgres_server.new_database(template) as second, psycopg.connect(second) as connection:
        assert connection.execute("SELECT count(*) > 0 FROM facts").fetchone() == (True,)
        assert connection.execute("SELECT clock_timestamp() < '2029-12-31'").fetchone() == (True,)
        connection.execute("ALTER TABLE orgs ADD COLUMN more int")

    with postgres_server.new_database(template) as third:
        assert second == first != third


def test_a_server_of_ones_own_keeps_its_data_over_a_crash_and_a_restart(own_postgres):
    with psycopg.connect(own_postgres.url()) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (1)")

    own_postgres.stop(signal.SIGQUIT)
    own_postgres.start()

    assert own_postgres.execute("SELECT n FROM kept") == [(1,)]
