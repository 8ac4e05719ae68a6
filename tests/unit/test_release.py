"""The version and the changelog fit each other; where the commit comes from."""

from __future__ import annotations

import re
import subprocess
import tomllib
from datetime import date
from itertools import chain
from pathlib import Path

import pytest

from worker import release

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GUARD = tomllib.loads((ROOT / "worker" / "guard" / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def sections(changelog: str) -> list[tuple[tuple[int, ...], date | None]]:
    """Version and day of each release in the changelog, None for one that is not released.

    Raises:
        ValueError: a heading of another form.
    """
    found = []
    for heading in re.findall(r"(?m)^## .*$", changelog):
        form = re.fullmatch(r"## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)", heading)
        if form is None:
            raise ValueError(
                f"CHANGELOG.md: {heading!r}: write `## 1.2.3 (unreleased)` or `## 1.2.3 (2030-01-31)`"
            )
        day = None if form[2] == "unreleased" else date.fromisoformat(form[2])
        found.append((tuple(map(int, form[1].split("."))), day))
    return found


def test_the_changelog_begins_with_this_version():
    found = sections((ROOT / "CHANGELOG.md").read_text())
    versions, days = [version for version, _ in found], [day for _, day in found]

    assert versions[0] == tuple(map(int, VERSION.split(".")))
    assert versions == sorted(set(versions), reverse=True)
    assert None not in days[1:], "only the newest version may be unreleased"
    released = [day for day in days if day is not None]
    assert released == sorted(released, reverse=True)


@pytest.mark.parametrize(
    "heading", ["## Unreleased", "## 0.2", "## 0.2.0", "## 0.2.0 (2030-02-30)", "## v0.2.0 (unreleased)"]
)
def test_a_heading_of_another_form_is_found(heading: str):
    with pytest.raises(ValueError):
        sections(f"# Changelog\n\n{heading}\n")


def test_every_dependency_has_a_floor_that_can_be_tested():
    """`./dev lowest` installs the version after `>=`."""
    required = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]

    assert [
        each for each in required if not re.match(r"[\w.-]+(\[[\w,-]+\])?>=\d[\w.]*(,<\d[\w.]*)?$", each)
    ] == []


def test_the_guard_has_the_same_dependencies_as_the_worker():
    assert set(GUARD["dependencies"]) <= set(PROJECT["dependencies"])


def test_the_installed_version_is_the_one_of_the_project():
    assert release.version() == VERSION


def test_a_built_commit_needs_no_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "commit").write_text("0123abc\n")
    monkeypatch.setattr(release, "BUILT_FROM", tmp_path / "commit")

    assert release.commit() == "0123abc"


@pytest.mark.parametrize("is_repository", [False, True], ids=["no repository", "no commit"])
def test_without_a_commit_it_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_repository: bool):
    monkeypatch.setattr(release, "BUILT_FROM", tmp_path / "worker" / "commit")
    if is_repository:
        subprocess.run(["git", "init", "--quiet", tmp_path], check=True)

    assert release.commit() == release.UNKNOWN


def test_a_checkout_asks_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def git(*arguments: str) -> str:
        named = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        command = ["git", "-C", str(tmp_path), *named, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "file").touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "First")
    monkeypatch.setattr(release, "BUILT_FROM", tmp_path / "worker" / "commit")
    clean = release.commit()
    (tmp_path / "another").touch()

    assert clean == git("rev-parse", "HEAD")
    assert release.commit() == f"{clean}+changes"
