"""Cgroups of runs are made only where they are meant to be; a tree of files stands in for the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.execution.runners.child.linux import RunGroups


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """/sys/fs/cgroup with a service to which a place is delegated, its worker in `worker`."""
    delegated = tmp_path / "system.slice" / "worker.service"
    (delegated / "worker").mkdir(parents=True)
    (delegated / "cgroup.controllers").write_text("cpu memory pids\n")
    (delegated / "cgroup.subtree_control").write_text("")
    return tmp_path


def groups(tree: Path, path: str = "/system.slice/worker.service/worker") -> RunGroups | None:
    own = tree / "own"
    own.write_text(f"1:name=systemd:/x\n0::{path}\n")
    return RunGroups.find(tree, own)


def test_a_run_gets_a_cgroup_with_its_cap_beside_the_workers(tree: Path) -> None:
    found = groups(tree)
    assert found is not None

    entry = found.make(7, 64 * 1024 * 1024)

    assert entry is not None
    group = Path(entry).parent
    assert (Path(entry).name, group.parent.name) == ("cgroup.procs", "worker.service")
    assert (group / "memory.max").read_text() == "67108864"
    assert (group / "memory.oom.group").read_text() == "1"
    assert (group.parent / "cgroup.subtree_control").read_text() == "+memory"


def test_a_run_that_the_kernel_killed_for_its_cap_is_told_from_others(tree: Path) -> None:
    found = groups(tree)
    assert found is not None
    events = Path(found.make(7, 1) or "").parent / "memory.events"

    assert not found.ran_out(7)
    events.write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 0\n")
    assert not found.ran_out(7)
    events.write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n")
    assert found.ran_out(7)
    assert not found.ran_out(8)


def test_a_cgroup_that_is_still_busy_is_taken_away_with_a_later_one(tree: Path) -> None:
    found = groups(tree)
    assert found is not None
    busy = Path(found.make(1, 1) or "").parent
    found.remove(1)
    assert busy.exists()

    for file in busy.iterdir():
        file.unlink()
    found.remove(2)

    assert not busy.exists()


@pytest.mark.parametrize(
    "path",
    [
        "/system.slice/worker.service",  # nothing delegated: the worker is in the unit's own
        "/user.slice/session-1.scope",  # somebody's shell, root's perhaps
        "/",
        "/nowhere/worker",
    ],
)
def test_cgroups_that_are_not_meant_for_us_are_left_alone(tree: Path, path: str) -> None:
    (tree / path.strip("/")).mkdir(parents=True, exist_ok=True)

    assert groups(tree, path) is None


def test_without_the_memory_controller_or_a_unified_tree_there_are_none(tree: Path) -> None:
    (tree / "system.slice" / "worker.service" / "cgroup.controllers").write_text("cpu pids\n")
    assert groups(tree) is None

    own = tree / "v1"
    own.write_text("4:memory:/worker\n")
    assert RunGroups.find(tree, own) is None
    assert RunGroups.find(tree, tree / "no such file") is None
