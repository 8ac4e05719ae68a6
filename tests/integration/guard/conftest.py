"""The wheel of orgworker-guard in an environment that has only what it depends on."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.fakes.key_server import KeyServer, key_server
from tests.integration.test_build import built_checkout

ROOT = Path(__file__).parents[3]
GUARD = ROOT / "worker" / "guard"


def needed(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that these requirements lead to, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [Requirement(each) for each in requirements]
    while left:
        requirement = left.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name.lower(), extra) in seen:
                continue
            seen.add((requirement.name.lower(), extra))
            installed = distribution(requirement.name)
            found[installed.name.lower()] = installed
            below = [Requirement(line) for line in installed.requires or ()]
            left += [one for one in below if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [built] = built_checkout(tmp_path_factory).glob("dist/orgworker_guard-*.whl")
    return built


@pytest.fixture(scope="session")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of that environment."""
    return installed_alone(wheel, tmp_path_factory.mktemp("guard") / "venv")


def installed_alone(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment with this wheel; dependencies are linked, nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "--disable-pip-version-check", wheel], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    lent = Path(sysconfig.get_path("purelib"))
    requires = [str(each) for each in distribution_of(site).requires or ()]
    for installed in needed(requires).values():
        for name in {
            file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            (site / name).symlink_to(lent / name)
    return python


def distribution_of(site: Path) -> Distribution:
    """The slim distribution that is installed there."""
    [folder] = site.glob("orgworker_*.dist-info")
    return Distribution.at(folder)


@pytest.fixture
def keys() -> Iterator[KeyServer]:
    with key_server() as server:
        yield server
