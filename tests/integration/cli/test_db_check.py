"""`db check` says what about its login leaves the web side with more rights than it needs."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.fakes.cli import CommandLine
from worker.ids import new_id
from worker.store import roles


def test_db_check_warns_of_a_superuser_that_owns_the_tables(tmp_path: Path, migrated_postgres_url: str):
    done = CommandLine(tmp_path, migrated_postgres_url)("db", "check", "-o", "json")

    above, owner = done.json()["warnings"]
    assert "superuser" in above
    assert "owns the tables" in owner
    assert [line.partition(": ")[0] for line in done.err.splitlines()] == ["warning"] * 2


def test_db_check_says_nothing_of_an_ordinary_login(tmp_path: Path, migrated_postgres_url: str):
    name = f"worker_{new_id()[-12:]}"
    with psycopg.connect(migrated_postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE {roles.WORKER}, {roles.WEB}, {roles.OPERATOR}")
        try:
            url = migrated_postgres_url.replace("postgres@", f"{name}@")
            done = CommandLine(tmp_path, url)("db", "check", "-o", "json")
        finally:
            connection.execute(f"DROP ROLE {name}")

    assert (done.json()["warnings"], done.err) == ([], "")
