"""Folders of runs: what a handler leaves in one is removed, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fakes.unprivileged import folder_of_the_account, in_account
from worker.engine.runners.child import run_folders


def closed(folder: Path) -> None:
    folder.chmod(0o000)


def closed_inside(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").touch()
    (folder / "a" / "b").chmod(0o000)
    (folder / "a").chmod(0o400)


def deep(folder: Path) -> None:
    """Deeper than a path may be long."""
    home = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    try:
        for _ in range(700):
            os.mkdir("deeper")
            os.chdir("deeper")
        Path("file").touch()
    finally:
        os.fchdir(home)
        os.close(home)


def named_like_ours(folder: Path) -> None:
    for name in ("removed-0", "a/removed-0", "a/removed-1/x"):
        (folder / name).mkdir(parents=True)


LEFT: dict[str, Callable[[Path], None]] = {
    "a closed folder": closed,
    "closed folders in it": closed_inside,
    "deep folders": deep,
    "names of our own": named_like_ours,
}


@pytest.fixture
def parent() -> Iterator[Path]:
    with folder_of_the_account() as folder:
        yield folder


def left_after(parent: Path, left: str, remove: Callable[[str], object]) -> list[str]:
    """What is left of a run's folder; in an account that is not root's, which may use every folder."""

    def leave_and_remove() -> list[str]:
        folder = parent / "run"
        folder.mkdir()
        LEFT[left](folder)
        remove(str(folder))
        return os.listdir(parent)

    found: list[str] = in_account(leave_and_remove)
    return found


@pytest.mark.parametrize("left", LEFT)
def test_a_folder_is_removed_whatever_is_in_it(parent: Path, left: str):
    assert left_after(parent, left, run_folders.remove) == []


@pytest.mark.parametrize("left", ["a closed folder", "closed folders in it"])
def test_the_control_leaves_a_closed_folder(parent: Path, left: str):
    """As before: `shutil.rmtree` without errors."""
    assert left_after(parent, left, partial(shutil.rmtree, ignore_errors=True)) == ["run"]


def test_links_are_removed_and_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir(0o750)
    (outside / "kept").touch(0o640)
    folder = tmp_path / "run"
    (folder / "inside").mkdir(parents=True)
    for name, target in (("to-folder", outside), ("to-file", outside / "kept"), ("inside/again", outside)):
        (folder / name).symlink_to(target)

    run_folders.remove(str(folder))

    assert not folder.exists()
    assert oct(outside.stat().st_mode) == "0o40750"
    assert oct((outside / "kept").stat().st_mode) == "0o100640"


def test_a_folder_that_was_replaced_by_a_link_is_left_alone(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir(0o750)
    (outside / "kept").touch()
    (tmp_path / "run").symlink_to(outside)

    run_folders.remove(str(tmp_path / "run"))

    assert (outside / "kept").exists()
    assert oct(outside.stat().st_mode) == "0o40750"


def test_names_are_not_guessed(tmp_path: Path):
    names = {run_folders.name_in(str(tmp_path)) for _ in range(100)}

    assert len(names) == 100
    assert all(len(os.path.basename(name)) == 32 for name in names)
