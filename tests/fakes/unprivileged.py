"""Runs commands as an unprivileged user if the tests run as root."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.fakes.postgres import unprivileged_user

ROOT = Path(__file__).parents[2]

# Makes the needed paths below closed folders reachable: in a mount namespace, each closed folder is an empty
# one that is open to all, and contains only the needed paths.
_REACH = """\
hold=$1 closed=$2 needed=$3
shift 3
mount -t tmpfs -o mode=755 tmpfs "$hold"
for path in $needed; do mkdir -p "$hold$path"; mount --rbind "$path" "$hold$path"; done
for path in $closed; do mount -t tmpfs -o mode=755 tmpfs "$path"; done
for path in $needed; do mkdir -p "$path"; mount --rbind "$hold$path" "$path"; done
exec "$@"
"""


def as_unprivileged(hold: Path) -> list[str]:
    """The words to put before a command. `hold` is an empty folder."""
    user = unprivileged_user()
    if user is None:
        return []
    drop = ["setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups"]
    closed = {}
    for path in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
        shut = [parent for parent in (path, *path.parents) if not parent.stat().st_mode & 0o001]
        if shut:
            closed[path] = shut[-1]
    if not closed:
        return drop
    script = ["sh", "-euc", _REACH, "sh", str(hold)]
    lists = [" ".join(sorted(map(str, set(paths)))) for paths in (closed.values(), closed)]
    return ["unshare", "--mount", "--propagation", "private", *script, *lists, *drop]


def hand_over(folder: Path) -> None:
    """Give the folder and its contents to the unprivileged user."""
    user = unprivileged_user()
    if user is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, *user)
