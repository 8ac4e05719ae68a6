"""What one process of a test run makes for all, in a folder that they share: a build, an image."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.postgres import locked


def folder(factory: pytest.TempPathFactory) -> Path:
    """One of `./dev test` for all its stages, or one of this pytest for all its processes."""
    if given := os.environ.get("ORGWORKER_TEST_RUN"):
        return Path(given)
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, which the first caller makes while the others wait; nobody changes it afterwards."""
    made = path.with_name(f"{path.name}.made")
    with locked(path.with_name(f"{path.name}.lock"), fcntl.LOCK_EX):
        if not made.exists():
            make(path)
            made.touch()
    return path


@contextlib.contextmanager
def used(path: Path, make: Callable[[Path], object], end: Callable[[Path], object]) -> Iterator[Path]:
    """The same, until the last process that uses it ends it."""
    lock = path.with_name(f"{path.name}.use")
    with path.with_name(f"{path.name}.users").open("a") as users:
        with locked(lock, fcntl.LOCK_EX):
            made_once(path, make)
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield path
        finally:
            with locked(lock, fcntl.LOCK_EX), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_name(f"{path.name}.made").unlink()
                end(path)
