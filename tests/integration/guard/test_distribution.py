"""orgworker-guard by itself: what it installs, what it imports, how long that takes, and that it works."""

from __future__ import annotations

import ast
import os
import resource
import statistics
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.fakes.key_server import KeyServer
from tests.integration.guard.conftest import GUARD, ROOT, distribution_of, needed

pytestmark = pytest.mark.feature("checkout")

FRAMEWORKS = {"django": {"asgiref", "django"}, "fastapi": {"fastapi"}, "flask": {"flask"}}
SCRIPT = """
import asyncio, sys
from orgworker_guard import Guard, IssuerUnavailable, TokenRefused

issuer, audience, token = sys.argv[1:]
guard = Guard(issuer, audience=audience)
print(guard.check_sync(token, org_code="org_a", client_id="client-a").org_code)

async def main():
    print((await guard.check(token)).client_id)
    try:
        await guard.check(token, org_code="org_b")
    except TokenRefused as refused:
        print(refused.reason)
    await guard.close()

asyncio.run(main())
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"sqlalchemy", "apscheduler", "worker"}))
"""


def sources() -> Iterable[Path]:
    return sorted(GUARD.glob("*.py"))


def test_it_imports_only_itself_and_what_it_declares():
    """Frameworks in modules of their own."""
    allowed = {*sys.stdlib_module_names, "cryptography", "httpx", "jwt"}
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            top = {name.partition(".")[0] for name in names}
            wrong += [(path.name, name) for name in top - allowed - FRAMEWORKS.get(path.stem, set())]

    assert wrong == []


def test_the_wheel_has_the_same_files_as_worker_guard(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        built = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    here = [*sources(), GUARD / "py.typed", *GUARD.glob("profiles/*.toml")]

    assert built == {f"orgworker_guard/{path.relative_to(GUARD)}": path.read_bytes() for path in here}


def test_it_has_the_version_and_license_of_orgworker_and_floors_that_are_not_lower(wheel: Path, alone: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    guard = tomllib.loads((GUARD / "pyproject.toml").read_text())["project"]
    site = site_of(alone)

    assert distribution_of(site).version == project["version"]
    assert guard["requires-python"] == project["requires-python"]
    assert set(guard["dependencies"]) <= set(project["dependencies"])
    assert (GUARD / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "orgworker" not in {Requirement(each).name for each in distribution_of(site).requires or ()}
    assert not [each for each in project["dependencies"] if "guard" in each]


def site_of(python: Path) -> Path:
    [site] = python.parents[1].glob("lib/python*/site-packages")
    return site


def test_it_works_without_the_rest(alone: Path, keys: KeyServer):
    command = [alone, "-P", "-c", SCRIPT, keys.url, keys.audience, keys.token()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={"PATH": os.defpath})

    assert done.stdout.split("\n") == ["org_a", "client-a", "org_mismatch", "", ""], done.stderr


@pytest.mark.parametrize("name", ["sqlalchemy", "apscheduler", "alembic", "worker", "starlette"])
def test_the_environment_really_lacks_the_rest(alone: Path, name: str):
    done = subprocess.run([alone, "-P", "-c", f"import {name}"], capture_output=True, text=True)

    assert "ModuleNotFoundError" in done.stderr


def size(files: Iterable[Path]) -> int:
    """Bytes of installed files. pip also compiles modules, to about the size of their sources."""
    counted = {".pyc": 0, ".py": 2}
    return sum(path.stat().st_size * counted.get(path.suffix, 1) for path in files if path.is_file())


def files_of(requirements: list[str]) -> Iterable[Path]:
    return (Path(str(file.locate())) for each in needed(requirements).values() for file in each.files or ())


def test_it_installs_at_most_three_tenths_of_orgworker(wheel: Path):
    """Both with what they need, and without pip."""
    guard = tomllib.loads((GUARD / "pyproject.toml").read_text())["project"]["dependencies"]
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    guard_size = size(files_of(guard)) + size(GUARD.rglob("*"))
    whole_size = size(files_of(whole)) + size((ROOT / "worker").rglob("*"))
    print(f"{guard_size / 1e6:.1f} MB of {whole_size / 1e6:.1f} MB: {guard_size / whole_size:.3f}")

    assert guard_size <= 0.3 * whole_size


def test_importing_the_guard_takes_at_most_a_quarter_longer_than_importing_httpx_and_jwt(alone: Path):
    """Median processor time of seven imports each, in turn."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([alone, "-P", "-c", code], check=True, env={"PATH": os.defpath})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    codes = ("import httpx, jwt", "from orgworker_guard import Guard")
    for code in codes:
        seconds(code)  # compiles
    taken = [[seconds(code) for code in codes] for _ in range(7)]
    base, guard = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"import httpx, jwt: {base * 1000:.0f} ms; Guard: {guard * 1000:.0f} ms; ratio {guard / base:.2f}")

    assert guard <= 1.25 * base
