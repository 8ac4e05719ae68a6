"""The folders of runs: names that cannot be guessed, and their removal, whatever a handler left in them."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from itertools import count

# What the owner needs to empty a folder.
_OPEN = 0o700
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def name_in(parent: str) -> str:
    """A path for a new folder of a run. Handlers can ask whether a path exists, so its name is random."""
    return os.path.join(parent, secrets.token_hex(16))


def remove(path: str) -> None:
    """Remove a folder of processes that have ended, as far as the kernel allows; follows no links.

    Folders in it are moved up and opened to the owner first. So neither their modes nor their depth matter,
    and one descriptor is open at a time.
    """
    with suppress(OSError):
        _open_to_owner(path)
        parent = os.open(path, _FOLDER)
        try:
            _empty(parent)
        finally:
            os.close(parent)
        os.rmdir(path)


def _empty(parent: int) -> None:
    """Remove everything in an open folder."""
    numbers = count()
    folders = _clear(parent, parent, numbers)
    while folders:
        name = folders.pop()
        with suppress(OSError):
            folder = os.open(name, _FOLDER, dir_fd=parent)
            try:
                folders += _clear(folder, parent, numbers)
            finally:
                os.close(folder)
            os.rmdir(name, dir_fd=parent)


def _clear(folder: int, parent: int, numbers: count[int]) -> list[str]:
    """Remove the files of an open folder, and move its folders into `parent`; returns their names there."""
    found = []
    with os.scandir(folder) as entries:
        listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in listed:
        with suppress(OSError):
            if not is_folder:
                os.unlink(name, dir_fd=folder)
                continue
            # A folder can be moved only if its owner may write to it.
            _open_to_owner(name, folder)
            if folder != parent:
                name = _moved(name, folder, parent, numbers)
            found.append(name)
    return found


def _moved(name: str, folder: int, parent: int, numbers: count[int]) -> str:
    """Move a folder into `parent`, under a name that nothing there has."""
    while True:
        new = f"removed-{next(numbers)}"
        try:
            os.stat(new, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(name, new, src_dir_fd=folder, dst_dir_fd=parent)
            return new


def _open_to_owner(name: str, folder: int | None = None) -> None:
    """Change the mode of a folder, never of what a link leads to."""
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.chmod(f"/proc/self/fd/{found}", _OPEN)
    finally:
        os.close(found)
