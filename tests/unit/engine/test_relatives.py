"""Finding the processes below this one while other processes come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from worker.engine.runners.child import linux

WAITS = "import sys; sys.stdin.read()"


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A child that waits, with one of its own that waits too."""
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    while len(below(linux.processes(), child.pid)) < 1:
        pass
    yield child
    child.communicate()


def below(table: dict[int, linux.Process], pid: int) -> set[int]:
    return linux.descendants(table, [pid])


def test_finds_what_the_whole_table_shows(family: subprocess.Popen[bytes]) -> None:
    relatives = linux.Relatives()

    for _ in range(3):
        found = below(relatives.table(), os.getpid())
        assert found >= {family.pid} | below(linux.processes(), family.pid)


def test_others_are_read_once(family: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    relatives = linux.Relatives()
    relatives.table()
    relatives.table()
    read: list[int] = []
    whole = linux.process_of
    monkeypatch.setattr(linux, "process_of", lambda pid: read.append(pid) or whole(pid))

    relatives.table()

    assert os.getppid() not in read
    assert 1 not in read
    assert family.pid in read


def test_a_process_that_outlives_its_parent_is_found(family: subprocess.Popen[bytes]) -> None:
    """It was known as a grandchild, and this process adopts it."""
    relatives = linux.Relatives()
    [grandchild] = below(linux.processes(), family.pid)
    relatives.table()
    linux.become_subreaper()
    try:
        family.kill()
        family.wait()

        assert grandchild in below(relatives.table(), os.getpid())
    finally:
        linux._prctl(linux._PR_SET_CHILD_SUBREAPER, 0)
        os.kill(grandchild, signal.SIGKILL)
        os.waitpid(grandchild, 0)


def test_another_process_with_a_known_pid_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    relatives = linux.Relatives()
    relatives.table()
    parent = os.getppid()
    assert parent not in relatives.table()

    # As if its pid had been given to a new process of ours.
    ours = linux.Process(parent, os.getpid(), 0, "S", float("inf"))
    whole, inode = linux.process_of, os.stat(f"/proc/{parent}").st_ino
    monkeypatch.setattr(linux, "process_of", lambda pid: ours if pid == parent else whole(pid))
    monkeypatch.setattr(relatives, "_others", {parent: inode + 1})

    assert relatives.table()[parent] == ours
