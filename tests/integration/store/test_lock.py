"""The lock beside a SQLite file: one worker a file, and a second is told who has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.clock import ManualClock
from worker.errors import Busy, ConfigurationError
from worker.store.engine import lock_sqlite_file


def test_a_second_worker_is_told_who_holds_the_file(sqlite_url: str, clock: ManualClock) -> None:
    lock = lock_sqlite_file(sqlite_url, clock=clock)

    with pytest.raises(Busy) as caught:
        lock_sqlite_file(sqlite_url)

    assert caught.value.exit_code == 75
    assert f"process {os.getpid()}" in str(caught.value)
    assert "2030-01-01T00:00:00" in str(caught.value)
    assert lock.path.name == "worker.db.lock"
    lock.release()
    lock_sqlite_file(sqlite_url).release()


def test_a_child_that_inherited_the_lock_keeps_it(sqlite_url: str) -> None:
    """A worker that was killed leaves its zygote and children behind for a moment."""
    lock = lock_sqlite_file(sqlite_url)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fd])
    lock.release()
    with pytest.raises(Busy):
        lock_sqlite_file(sqlite_url)

    child.communicate(b"\n")

    lock_sqlite_file(sqlite_url).release()


def test_a_place_that_cannot_hold_a_lock_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        lock_sqlite_file(f"sqlite:///{tmp_path}/file/worker.db")
