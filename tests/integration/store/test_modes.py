"""Files of database and state: for their owner only, whatever the umask, which stays as it is."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.clock import SystemClock
from worker.store import schema
from worker.store.database import Database
from worker.store.engine import lock_sqlite_file
from worker.tokens.sealing import KeyRing


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    assert os.umask(before) == 0, "somebody has changed the umask of the process"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_database_lock_and_key_ring_are_their_owners(tmp_path: Path) -> None:
    folder = tmp_path / "var"
    file = folder / "worker.db"
    url = f"sqlite:///{file}"
    schema.upgrade(url)
    database = Database.open(url, clock=SystemClock())
    lock = lock_sqlite_file(url)
    KeyRing.generate(folder / "keyring")

    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE facts SET value = value")
        made = {path.name: mode(path) for path in folder.iterdir()}

    assert set(made) >= {f"worker.db{suffix}" for suffix in ("", "-wal", "-shm", ".lock")} | {"keyring"}
    assert set(made.values()) == {0o600}
    assert mode(folder) == 0o700
    lock.release()
    database.close()


def test_sqlite_alone_would_open_them_to_all(tmp_path: Path) -> None:
    """The control: what the driver makes under the same umask."""
    file = tmp_path / "worker.db"
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE one (number)")

        assert mode(file) == mode(file.with_name("worker.db-wal")) == 0o644

    connection.close()


def test_files_that_are_there_keep_their_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    url = f"sqlite:///{tmp_path}/worker.db"
    for name in ("worker.db", "worker.db.lock"):
        (tmp_path / name).touch(0o640)

    schema.upgrade(url)
    lock_sqlite_file(url).release()

    assert {mode(tmp_path / name) for name in ("worker.db", "worker.db.lock")} == {0o640}
    assert mode(tmp_path) == 0o750


def test_a_command_makes_them_so(tmp_path: Path) -> None:
    """A process of its own, under an umask that takes nothing away."""
    (tmp_path / "worker.toml").write_text('[database]\nurl = "sqlite:///var/worker.db"\n')
    command = [sys.executable, "-P", "-m", "worker", "--config", "worker.toml"]
    for arguments in (["db", "upgrade"], ["keys", "generate"], ["doctor", "--bundle", "var/bundle.json"]):
        subprocess.run([*command, *arguments], cwd=tmp_path, check=True, capture_output=True)

    modes = {path.name: mode(path) for path in (tmp_path / "var").iterdir()}
    assert set(modes) >= {"worker.db", "keyring", "bundle.json"}
    assert set(modes.values()) == {0o600}
