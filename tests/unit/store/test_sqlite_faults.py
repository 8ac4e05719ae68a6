"""A file has no server: what is wrong with it is said, with its own fix."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from worker.errors import StoreUnavailable
from worker.store.database import translated


def test_a_read_only_file_is_not_asked_whether_it_is_running(tmp_path: Path):
    file = tmp_path / "worker.db"
    sqlite3.connect(file).execute("CREATE TABLE t (x)").connection.close()
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)

    with pytest.raises(StoreUnavailable) as raised, translated():
        connection.execute("INSERT INTO t VALUES (1)")
    connection.close()

    error = raised.value
    assert error.message.startswith("the database file is read-only for this user: ")
    assert "let this user write the file of database.url" in error.fix
    assert "running" not in error.fix
    assert error.transient, "a worker keeps trying: the file system may come back"


def test_a_file_that_cannot_be_opened_is_a_matter_of_rights_or_of_the_path(tmp_path: Path):
    with pytest.raises(StoreUnavailable, match="cannot be opened") as raised, translated():
        sqlite3.connect(tmp_path / "absent" / "worker.db")

    assert "its folder" in raised.value.fix


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (sqlite3.SQLITE_FULL, "the disk is full"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "the database is locked"),
        (sqlite3.SQLITE_IOERR_FSYNC, "the disk fails"),
    ],
)
def test_each_fault_of_a_file_has_its_fix(code: int, message: str):
    error = sqlite3.OperationalError("reason")
    error.sqlite_errorcode = code

    with pytest.raises(StoreUnavailable, match=f"{message}: reason") as raised, translated():
        raise error

    assert "running" not in raised.value.fix
