"""A module of the working directory that Python imports in place of orgworker."""

from __future__ import annotations

from pathlib import Path

from worker.errors import Diagnostic

OURS = Path(__file__).resolve().parents[1] / "__init__.py"
FIX = "rename it, or use `orgworker` or `python -P -m worker` there"


def shadow_in(folder: Path) -> Path | None:
    """A `worker.py` or package `worker` of this folder, which `python -m worker` runs there; None without."""
    for path in (folder / "worker" / "__init__.py", folder / "worker.py"):
        if path.is_file() and path.resolve() != OURS:
            return path
    return None


def shadow(folder: Path) -> Diagnostic | None:
    """The warning of `doctor` if `python -m worker` in this folder does not run orgworker."""
    found = shadow_in(folder)
    if found is None:
        return None
    return Diagnostic("shadow", True, f"`python -m worker` runs {found} here, not orgworker", FIX)


def warning(folder: Path) -> str | None:
    """The same as one line for a person."""
    found = shadow(folder)
    return None if found is None else f"warning: {found.detail}; {found.fix}"
