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


def test_db_upgrade_warns_of_a_worker_that_may_not_act_for_callers(
    tmp_path: Path, migrated_postgres_url: str
):
    name = f"worker_{new_id()[-12:]}"
    with psycopg.connect(migrated_postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
        try:
            line = CommandLine(tmp_path, migrated_postgres_url.replace("postgres@", f"{name}@"))
            text = line.settings.read_text()
            owner = f'owner_url = "{migrated_postgres_url}"\n[issuers'
            line.settings.write_text(text.replace("[issuers", owner))
            done = line("db", "upgrade")
        finally:
            connection.execute(f"DROP OWNED BY {name}")
            connection.execute(f"DROP ROLE {name}")

    assert f"is not a member of {roles.OPERATOR} and {roles.WEB}: GRANT" in done.err
