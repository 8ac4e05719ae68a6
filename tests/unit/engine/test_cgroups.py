"""Cgroups of runs are made only where they are meant to be; a tree of files stands in for the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.engine.runners.child.linux import RunGroups, write_cap


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """/sys/fs/cgroup with a service to which a place is delegated, its worker in `worker`."""
    delegated = tmp_path / "system.slice" / "orgworker.service"
    (delegated / "worker").mkdir(parents=True)
    (delegated / "cgroup.controllers").write_text("cpu memory pids\n")
    (delegated / "cgroup.subtree_control").write_text("")
    return tmp_path


def groups(tree: Path, path: str = "/system.slice/orgworker.service/worker") -> RunGroups | None:
    own = tree / "own"
    own.write_text(f"1:name=systemd:/x\n0::{path}\n")
    return RunGroups.find(tree, own)


def test_a_run_gets_a_cgroup_beside_the_workers(tree: Path) -> None:
    found = groups(tree)
    assert found is not None

    made = found.make(7)

    assert made is not None
    group = Path(made)
    assert group.parent.name == "orgworker.service"
    assert (group / "memory.oom.group").read_text() == "1"
    assert (group.parent / "cgroup.subtree_control").read_text() == "+memory"


@pytest.mark.parametrize(("memory", "written"), [(64 * 1024 * 1024, "67108864"), (None, "")])
def test_a_run_sets_its_cap_and_closes_the_file(tmp_path: Path, memory: int | None, written: str) -> None:
    file = tmp_path / "memory.max"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)

    write_cap(descriptor, memory)

    assert file.read_text() == written
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(descriptor)


def test_a_run_that_the_kernel_killed_for_its_cap_is_told_from_others(tree: Path) -> None:
    found = groups(tree)
    assert found is not None
    events = Path(found.make(7) or "") / "memory.events"

    assert not found.ran_out(7)
    events.write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 0\n")
    assert not found.ran_out(7)
    events.write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n")
    assert found.ran_out(7)
    assert not found.ran_out(8)


def test_a_cgroup_that_is_still_busy_is_taken_away_with_a_later_one(tree: Path) -> None:
    found = groups(tree)
    assert found is not None
    busy = Path(found.make(1) or "")
    found.remove(1)
    assert busy.exists()

    for file in busy.iterdir():
        file.unlink()
    found.remove(2)

    assert not busy.exists()


@pytest.mark.parametrize(
    "path",
    [
        "/system.slice/orgworker.service",  # nothing delegated: the worker is in the unit's own
        "/user.slice/session-1.scope",  # somebody's shell, root's perhaps
        "/",
        "/nowhere/worker",
    ],
)
def test_cgroups_that_are_not_meant_for_us_are_left_alone(tree: Path, path: str) -> None:
    (tree / path.strip("/")).mkdir(parents=True, exist_ok=True)

    assert groups(tree, path) is None


def test_without_the_memory_controller_or_a_unified_tree_there_are_none(tree: Path) -> None:
    (tree / "system.slice" / "orgworker.service" / "cgroup.controllers").write_text("cpu pids\n")
    assert groups(tree) is None

    own = tree / "v1"
    own.write_text("4:memory:/worker\n")
    assert RunGroups.find(tree, own) is None
    assert RunGroups.find(tree, tree / "no such file") is None
