"""The suites of the core and of its features: `python -m tests.suites core|FEATURE... [-- PYTEST ARGUMENTS]`.

Each runs in a copy of this checkout without the other features, as in a wheel that lacks them. A test file
belongs to the features that it imports, directly or through other files of the tests; one that only calls
their verbs says so with `pytest.mark.feature(NAME)`.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from worker.app.features import FEATURES

ROOT = Path(__file__).parents[1]
NAMES = tuple(feature.name for feature in FEATURES)
# Set for the tests in a copy: the features that it has, separated by blanks.
VARIABLE = "ORGWORKER_SUITE"
# Which processes and databases a suite needs is up to its files; these look at the whole checkout.
FOLDERS = ("tests/unit", "tests/integration", "tests/acceptance", "tests/migrations")
TOGETHER = ("--numprocesses", "2", "--dist", "loadfile")
_MARKS = re.compile(r"^pytestmark\b.*", re.MULTILINE)
_FEATURE = re.compile(r"mark\.feature\(\"(\w+)\"\)")


@cache
def features_of(file: Path) -> frozenset[str]:
    """The features that a test file, a conftest or a module of the demo needs."""
    return _features_of(file, set())


def _features_of(file: Path, seen: set[Path]) -> frozenset[str]:
    seen.add(file)
    text = file.read_text(encoding="utf-8")
    found = {name for line in _MARKS.findall(text) for name in _FEATURE.findall(line)}
    beside = [folder / "conftest.py" for folder in file.parents if folder.is_relative_to(ROOT / "tests")]
    wanted = [each for each in beside if each.exists()]
    for module in _imported(ast.parse(text)):
        parts = module.split(".")
        if parts[:2] == ["worker", "features"] and len(parts) > 2:
            found.add(parts[2])
        elif parts[0] in ("tests", "docs", "bench") or parts[:2] == ["worker", "demo"]:
            place = ROOT.joinpath(*parts)
            wanted += [each for each in (place.with_suffix(".py"), place / "__init__.py") if each.exists()]
    for other in wanted:
        if other not in seen:
            found |= _features_of(other, seen)
    return frozenset(found)


def _imported(tree: ast.Module) -> Iterator[str]:
    """What a file imports before anything in it is called."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def is_left_out(needed: frozenset[str]) -> bool:
    """Whether the suite that runs here is not that of a test with these features."""
    suite = os.environ.get(VARIABLE)
    return suite is not None and needed != frozenset(suite.split())


def is_lacking(needed: frozenset[str]) -> bool:
    """Whether the copy that runs here lacks one of these features."""
    suite = os.environ.get(VARIABLE)
    return suite is not None and not needed <= frozenset(suite.split())


def is_here(command: str) -> bool:
    """Whether the features that are installed have this command."""
    absent = {verb for feature in FEATURES if not feature.is_installed() for verb in feature.verbs}
    return not any(f"{command} ".startswith(f"{verb} ") for verb in absent)


def run(features: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a suite in a copy with these features only; returns the exit code of pytest."""
    with tempfile.TemporaryDirectory(prefix="orgworker-suite-") as name:
        folder = Path(name)
        # Runs have users of their own.
        folder.chmod(0o755)
        copy_to(folder / "checkout", features)
        python = _environment(folder / "venv", folder / "checkout")
        command = [python, "-m", "pytest", "--quiet", *(arguments or (*TOGETHER, *FOLDERS))]
        given = os.environ | {VARIABLE: " ".join(features)}
        return subprocess.run(command, cwd=folder / "checkout", env=given, check=False).returncode


def copy_to(folder: Path, features: Sequence[str]) -> None:
    """Copy what git has of this checkout, with these features only."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    left_out = {f"worker/features/{name}" for name in set(NAMES) - set(features)}
    if not features:
        left_out = {"worker/features"}
    for file in filter(None, listed.stdout.split("\0")):
        if not any(file.startswith(f"{place}/") for place in left_out) and (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file, follow_symlinks=False)


def _environment(folder: Path, checkout: Path) -> str:
    """An environment with the dependencies of this one, and the copy in place of the checkout."""
    venv.create(folder, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # Folders named there are searched, and no `.pth` in them is read: that is how this checkout is installed.
    lines = [str(checkout), sysconfig.get_path("purelib")]
    Path(packages, "suite.pth").write_text("\n".join(lines) + "\n")
    # A program of a package: its tests look for it beside Python.
    for program in ("temporal", "ruff"):
        (folder / "bin" / program).symlink_to(Path(sys.executable).with_name(program))
    return str(folder / "bin" / "python")


def main(arguments: Sequence[str]) -> int:
    names, options = list(arguments), []
    if "--" in names:
        place = names.index("--")
        names, options = names[:place], names[place + 1 :]
    unknown = set(names) - {"core", *NAMES}
    if unknown or not names:
        print(f"name suites: core, {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = [name for name in names if run([] if name == "core" else [name], options) != 0]
    print(f"failed: {', '.join(failed)}" if failed else "passed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
