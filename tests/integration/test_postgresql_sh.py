"""config/postgresql.sh on a real server: the roles and the database of docs/operating/postgresql.md."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psycopg
import pytest

from tests.fakes import postgres
from tests.fakes.clock import ManualClock
from worker.store import roles, schema
from worker.store.database import Database

SCRIPT = Path(__file__).parents[2] / "config" / "postgresql.sh"
PASSWORDS = {"owner": "0wnerSecret", "worker": "w0rkerSecret", "serve": "s3rveSecret"}


@pytest.fixture
def urls(own_postgres: postgres.Server, tmp_path: Path) -> dict[str, str]:
    """The URLs of all logins, after the script has run as PostgreSQL's image runs it."""
    at = f"127.0.0.1:{own_postgres.port}/orgworker"
    urls = {role: f"postgresql://{role}:{password}@{at}" for role, password in PASSWORDS.items()}
    (tmp_path / "database__owner_url").write_text(urls["owner"])
    (tmp_path / "database__url").write_text(f"{urls['worker']}\n")
    (tmp_path / "serve_database__url").write_text(urls["serve"])
    folder = postgres.binaries(own_postgres.folder / "binaries", postgres.unprivileged_user())
    environment = {
        "PATH": f"{folder}:{os.defpath}",
        "SECRETS": str(tmp_path),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(own_postgres.port),
    }
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not [word for word in PASSWORDS.values() if word in done.stdout + done.stderr]
    # From here on a password is asked for, where the server of the tests trusts everybody.
    rules = own_postgres.folder / "data" / "pg_hba.conf"
    rules.write_text(f"host all owner,worker,serve 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    own_postgres.execute("SELECT pg_reload_conf()")
    return urls


def test_the_owner_migrates_and_the_worker_has_no_more_rights_than_it_needs(urls: dict[str, str]):
    schema.upgrade(urls["worker"], urls["owner"])

    database = Database.open(urls["worker"], clock=ManualClock())
    try:
        with database.autocommit() as connection:
            schema.check(connection)
            assert roles.warnings(connection) == []
    finally:
        database.close()
    with psycopg.connect(urls["worker"]) as worker, pytest.raises(psycopg.errors.InsufficientPrivilege):
        worker.execute("CREATE TABLE intruder (id int)")


def test_the_login_of_serve_acts_for_callers_and_reads_nothing_by_itself(urls: dict[str, str]):
    schema.upgrade(urls["worker"], urls["owner"])

    database = Database.open(urls["serve"], clock=ManualClock())
    try:
        schema.check_for_web(database)
        with database.autocommit() as connection:
            assert roles.serve_warnings(connection) == []
    finally:
        database.close()
    with psycopg.connect(urls["serve"]) as serve, pytest.raises(psycopg.errors.InsufficientPrivilege):
        serve.execute("SELECT code FROM orgs")


def test_a_login_has_the_password_of_its_url_and_no_other(urls: dict[str, str]):
    wrong = urls["worker"].replace(PASSWORDS["worker"], PASSWORDS["owner"])

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)
