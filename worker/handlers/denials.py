"""Detects errors caused by the sandbox and names the setting to change."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator

_HINT = "the sandbox denies {paths}: add it to [execution] read_paths or write_paths"
_MULTIPROCESSING = "the sandbox may have denied it; multiprocessing needs /dev/shm in [execution] write_paths"
_sandboxed = False


def sandboxed() -> None:
    """Record that this process is in the sandbox."""
    global _sandboxed
    _sandboxed = True


def hint(error: BaseException) -> str | None:
    """What to do if the sandbox caused the error, or None if it did not.

    It did if the file's own permissions allow the access.
    """
    if not _sandboxed:
        return None
    denied = [cause for cause in _causes(error) if isinstance(cause, PermissionError)]
    paths = [
        path
        for cause in denied
        for path in (cause.filename, cause.filename2)
        if isinstance(path, (str, bytes)) and _permitted(path)
    ]
    if paths:
        names = dict.fromkeys(repr(os.path.abspath(os.fsdecode(path))) for path in paths)
        return _HINT.format(paths=" and ".join(names))
    if any(cause.filename is None and _in_multiprocessing(cause) for cause in denied):
        return _MULTIPROCESSING
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        cause = queue.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        queue += [cause.__cause__, cause.__context__]
        if isinstance(cause, BaseExceptionGroup):
            queue += cause.exceptions


def _permitted(path: str | bytes) -> bool:
    """Whether the permissions of the file, or of the folder to create it in, allow access."""
    if os.path.exists(path):
        return any(os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK))
    return os.access(os.path.dirname(path) or os.curdir, os.W_OK | os.X_OK)


def _in_multiprocessing(error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("multiprocessing.") for frame in frames)
