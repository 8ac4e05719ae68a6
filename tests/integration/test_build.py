"""`./dev build` in two copies of this checkout: what it makes, and that it makes the same twice.

It is called as docs/operating/release.md says, to make a release and to verify one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.fakes import shared
from tests.fakes.pages import ROOT, blocks

pytestmark = pytest.mark.feature("checkout")

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMMITTED_AT = "2030-01-02T03:04:05Z"
# Equal in all copies, so that the commits are, too.
AUTHOR = {
    f"GIT_{role}_{name}": value
    for role in ("AUTHOR", "COMMITTER")
    for name, value in {"NAME": "Test", "EMAIL": "test@example.com", "DATE": COMMITTED_AT}.items()
}
# No index, and nothing of this machine's configuration of pip and git.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "GIT_CONFIG_GLOBAL": os.devnull}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, *arguments]
    environment = os.environ | AUTHOR | OFFLINE
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def copy_of_checkout(folder: Path) -> Path:
    """A repository with one commit of the files as they are here, and this environment as its own."""
    listed = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, git(ROOT, *listed).split("\0")):
        # One that is deleted here is still listed.
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "A commit of the test")
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    stamp = "{ pwd; cat pyproject.toml config/requirements/dev.lock; } | cksum >.venv/stamp"
    subprocess.run(["sh", "-c", stamp], cwd=folder, check=True)
    return folder


def commands(page: str, *, by: str) -> list[list[str]]:
    """The lines of each block of a page that this test runs."""
    found = blocks((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [
        [line.removeprefix("$ ") for line in block.text.splitlines()]
        for block in found
        if block.marks.get("by") == by
    ]


def run(lines: list[str], folder: Path) -> str:
    """What the commands of a page print in a checkout."""
    done = subprocess.run(
        ["sh", "-c", "\n".join(["set -eu", *lines])],
        cwd=folder,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_built_in(folder: Path, out: Path, commit_of: Path) -> Path:
    """The wheel of a source tree, with the time of a checkout's commit."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": git(commit_of, "log", "-1", "--format=%ct")}
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    [wheel] = out.glob("*.whl")
    return wheel


BUILD, VERIFY = commands("operating/release.md", by="test_build")


def built_checkout(factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which the page's commands have built, for the whole test run."""
    return shared.made_once(
        shared.folder(factory) / "checkout", lambda folder: run(BUILD, copy_of_checkout(folder))
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_checkout(tmp_path_factory)


@pytest.fixture(scope="module")
def built(checkout: Path) -> dict[str, Path]:
    return {path.name: path for path in (checkout / "dist").iterdir()}


def wheel_of(built: dict[str, Path]) -> Path:
    return built[f"orgworker-{VERSION}-py3-none-any.whl"]


def test_two_builds_of_a_commit_are_equal(built: dict[str, Path], checkout: Path, tmp_path: Path):
    """So whoever was given the hashes can verify them, in a checkout of their own."""
    folder = copy_of_checkout(tmp_path / "a folder of another name")
    # Neither times nor modes of the files are the commit's.
    for path in folder.joinpath("worker").rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)

    dist = folder / "dist"
    dist.mkdir()
    received = shutil.copy(built["SHA256SUMS"], dist / "SHA256SUMS.received")

    commit = git(checkout, "rev-parse", "HEAD")
    printed = run([line.replace("COMMIT", commit) for line in VERIFY], folder)

    checked = [line for line in printed.splitlines() if line.endswith(": OK")]
    assert len(checked) == len(received.read_text().splitlines()) == len(built) - 1 > 2
    received.unlink()
    assert {path.name: path.read_bytes() for path in dist.iterdir()} == {
        name: path.read_bytes() for name, path in built.items()
    }


def test_a_change_makes_another_build_and_version(built: dict[str, Path], tmp_path: Path):
    """The control: what is equal above could differ."""
    folder = copy_of_checkout(tmp_path / "changed")
    with (folder / "worker" / "ids.py").open("a") as file:
        file.write("# changed\n")

    changed = wheel_built_in(folder, tmp_path / "dist", folder)

    assert changed.read_bytes() != wheel_of(built).read_bytes()
    with zipfile.ZipFile(changed) as wheel:
        assert wheel.read("worker/commit").decode().strip() == git(folder, "rev-parse", "HEAD") + "+changes"


@pytest.mark.parametrize("name", ["orgworker", "orgworker_guard", "orgworker_client"])
def test_the_wheel_of_the_sdist_is_the_wheel(
    built: dict[str, Path], checkout: Path, tmp_path: Path, name: str
):
    with tarfile.open(built[f"{name}-{VERSION}.tar.gz"]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"{name}-{VERSION}"
    wheel = built[f"{name}-{VERSION}-py3-none-any.whl"]
    again = wheel_built_in(unpacked, tmp_path / "dist", checkout)

    assert (again.name, again.read_bytes()) == (wheel.name, wheel.read_bytes())


def test_the_sums_are_of_all_files(built: dict[str, Path]):
    listed = re.findall(r"(?m)^([0-9a-f]{64})  (\S+)$", built["SHA256SUMS"].read_text())

    assert {name: digest for digest, name in listed} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in built.items()
        if name != "SHA256SUMS"
    }


def test_the_wheel_knows_its_version_and_commit(built: dict[str, Path], checkout: Path, tmp_path: Path):
    """Inside another repository, which it is not part of."""
    git(tmp_path, "init", "--quiet")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        wheel.extractall(site)

    # Dependencies come from this environment, later on the path.
    command = [sys.executable, "-P", "-m", "worker", "--version"]
    environment = {"PATH": os.defpath, "PYTHONPATH": str(site)}
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    assert printed == f"{VERSION} (commit {git(checkout, 'rev-parse', 'HEAD')})\n"


def test_the_bill_of_materials_is_the_lock(built: dict[str, Path]):
    bill = json.loads(built[f"orgworker-{VERSION}.cdx.json"].read_text())
    lock = (ROOT / "config/requirements/run.lock").read_text()

    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", VERSION)
    assert bill["metadata"]["timestamp"] == COMMITTED_AT.replace("Z", "+00:00")
    found = {(each["name"], each["version"]) for each in bill["components"]}
    assert found == set(re.findall(r"(?m)^([\w.-]+)==([\w.+!-]+)", lock))
    digests = [
        digest["content"]
        for each in bill["components"]
        for reference in each["externalReferences"]
        for digest in reference.get("hashes", ())
    ]
    assert sorted(digests) == sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})", lock))
