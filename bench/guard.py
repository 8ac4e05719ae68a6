"""orgworker-guard beside orgworker: what each installs, and how long its import takes.

`python -m bench.guard [python3.11 …]` builds both wheels and installs each into a new virtual environment
with what it needs, from an index.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = ("import httpx, jwt", "from orgworker_guard import Guard")
TIMES = 20
# Of a new virtual environment itself.
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack")


def wheel(project: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    [built] = out.glob("*.whl")
    return built


def installed(python: str, built: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the wheel."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    interpreter = folder / "bin" / "python"
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([interpreter, "-m", "pip", "install", *quiet, built], check=True)
    return interpreter


def megabytes(interpreter: Path) -> float:
    """The files in site-packages, with byte code."""
    [site] = interpreter.parents[1].glob("lib/python*/site-packages")
    ours = [each for each in site.iterdir() if not each.name.startswith(NOT_OURS)]
    files = [file for each in ours for file in (each.rglob("*") if each.is_dir() else [each])]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def milliseconds(interpreter: Path, code: str) -> float:
    """Processor time of a process that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([interpreter, "-P", "-c", code], check=True, env={"PATH": os.defpath})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def main() -> None:
    for python in sys.argv[1:] or [sys.executable]:
        with tempfile.TemporaryDirectory(prefix="orgworker-guard-") as name:
            folder = Path(name)
            guard = installed(python, wheel(ROOT / "worker" / "guard", folder / "one"), folder / "guard")
            whole = installed(python, wheel(ROOT, folder / "other"), folder / "whole")
            small, large = megabytes(guard), megabytes(whole)
            for code in IMPORTS:
                milliseconds(guard, code)  # compiles
            taken = [[milliseconds(guard, code) for code in IMPORTS] for _ in range(TIMES)]
            base, ours = (statistics.median(column) for column in zip(*taken, strict=True))
            print(f"{python}: {small:.1f} MB of {large:.1f} MB, ratio {small / large:.2f}")
            print(f"{python}: {base:.0f} ms, {ours:.0f} ms, ratio {ours / base:.2f}")


if __name__ == "__main__":
    main()
