"""Errors of database drivers as errors of the command line."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from psycopg.errors import InsufficientPrivilege, NumericValueOutOfRange, UndefinedColumn, UniqueViolation
from sqlalchemy.exc import DBAPIError, IntegrityError

from worker.app.shell import from_driver, invoke
from worker.errors import AccessDenied, Busy, ConfigurationError, UsageError


def test_a_login_that_may_not_do_this_is_denied():
    error = DBAPIError("SELECT 1", None, InsufficientPrivilege("permission denied for table orgs\nLINE 1"))

    known = from_driver(error)

    assert isinstance(known, AccessDenied)
    assert known.exit_code == 4
    assert known.message.endswith("permission denied for table orgs")
    assert "Many workers on one PostgreSQL" in known.fix


@pytest.mark.parametrize("wrapped", [True, False])
def test_of_two_commands_that_add_the_same_the_later_one_is_to_be_repeated(wrapped: bool):
    raw = UniqueViolation('duplicate key value violates unique constraint "uq_templates_name"')

    known = from_driver(IntegrityError("INSERT", None, raw) if wrapped else raw)

    assert isinstance(known, Busy)
    assert known.exit_code == 75


def test_a_number_that_no_column_holds_is_a_wrong_command_line():
    with closing(sqlite3.connect(":memory:")) as file, pytest.raises(OverflowError) as raised:
        file.execute("SELECT ?", (10**20,))
    too_large = DBAPIError("SELECT 1", None, NumericValueOutOfRange("integer out of range"))

    assert isinstance(from_driver(raised.value), UsageError)
    assert isinstance(from_driver(too_large), UsageError)
    assert from_driver(OverflowError("date value out of range")) is None


@pytest.mark.parametrize("code", [sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT])
def test_a_file_that_is_none_or_damaged_is_configuration(code: int):
    error = sqlite3.DatabaseError("malformed")
    error.sqlite_errorcode = code

    known = from_driver(error)

    assert isinstance(known, ConfigurationError)
    assert "backup" in known.fix


@pytest.mark.parametrize(
    "error", [UndefinedColumn("no such column"), sqlite3.DatabaseError(), ValueError("x")]
)
def test_what_nobody_expected_stays_so(error: Exception):
    assert from_driver(error) is None


def test_an_argument_in_another_encoding_is_a_wrong_command_line():
    with pytest.raises(UnicodeEncodeError) as raised:
        b"M\xfcnchen".decode("utf-8", "surrogateescape").encode()

    assert isinstance(from_driver(raised.value), UsageError)


def test_a_command_says_that_the_file_is_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "worker.db"
    file.write_text("no database at all, but some text that is long enough to be looked at" * 10)

    assert invoke(["--set", f"database.url=sqlite:///{file}", "runs", "list"]) == 78
    assert "is not an SQLite database" in capsys.readouterr().err
