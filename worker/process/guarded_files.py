"""Files with secrets, whose modes handlers must not change: Landlock hides their contents, but allows chmod.

A handler has the account of the worker. It cannot read the key ring, but if the account owns it, the handler
can let every other account read it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from worker.clock import Clock
from worker.errors import ConfigurationError
from worker.settings import Settings
from worker.telemetry.events import emit

# After this a worker reports files that handlers could open again: sooner than an alert goes quiet.
REMIND_EVERY = timedelta(hours=24)
# What SQLite keeps beside a database, with its mode.
JOURNALS = ("", "-wal", "-shm", "-journal")
# Rights of group and others, and what gives rights to single accounts.
OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO
ACCESS_LIST = "system.posix_acl_access"
# Capabilities of root by which a process changes the mode of what it does not own: CHOWN, FOWNER, SETUID.
_OF_ROOT = 1 << 0 | 1 << 3 | 1 << 7


def guarded(settings: Settings) -> list[str]:
    """The existing files with secrets that the sandbox requires to be closed for good; the database is not.

    They are the key ring, the settings, and a host's token.
    """
    named = [settings.config_file, settings.host.token_file, settings.attempts.key, settings.temporal.key]
    with suppress(ConfigurationError):  # no key ring is configured
        named.append(str(settings.keyring_file))
    with suppress(OSError):
        named += sorted(entry.path for entry in os.scandir(settings.secrets_dir or os.devnull))
    # A mounted secret is a link, beside folders with its versions.
    return [path for path in dict.fromkeys(named) if path and os.path.isfile(path)]


def changeable(paths: Iterable[str]) -> list[str]:
    """What this account could open to others: of each file the file itself, or the folder that hides it."""
    return list(dict.fromkeys(found for path in paths if (found := _to_be_opened(path)) is not None))


def _to_be_opened(path: str) -> str | None:
    try:
        if _may_change(path):
            return path
        file = Path(path).resolve(strict=True)
        if not file.stat().st_mode & stat.S_IROTH:
            return None
        closed = [folder for folder in file.parents if not folder.stat().st_mode & stat.S_IXOTH]
        return str(closed[0]) if closed and all(map(_may_change, closed)) else None
    except OSError:  # it was removed meanwhile
        return None


def _may_change(path: str | Path) -> bool:
    """Whether a handler of this account may change the mode; on a read-only mount not even root's may."""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return False
    return os.stat(path).st_uid in os.getresuid() or bool(_capabilities() & _OF_ROOT)


def _capabilities() -> int:
    """The effective capabilities of this process, as bits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


class _Seen(NamedTuple):
    """A file or folder, its mode and its access list; of a folder only the right to search it counts."""

    device: int
    inode: int
    mode: int
    of_others: int
    access_list: bytes | None

    @classmethod
    def at(cls, path: str) -> _Seen:
        found = os.stat(path)
        of_others = 0o011 if stat.S_ISDIR(found.st_mode) else OF_OTHERS
        return cls(found.st_dev, found.st_ino, stat.S_IMODE(found.st_mode), of_others, _access_list(path))

    def has_opened(self, since: _Seen) -> bool:
        """Whether others may do more than before. An access list adds accounts without changing the mode."""
        added = self.access_list is not None and self.access_list != since.access_list
        return added or bool(self.mode & self.of_others & ~since.mode)

    def restore(self, path: str) -> None:
        """Give the path this mode and access list; raises OSError."""
        if self.access_list is not None:
            os.setxattr(path, ACCESS_LIST, self.access_list)
        elif _access_list(path) is not None:
            os.removexattr(path, ACCESS_LIST)
        os.chmod(path, self.mode)


def _access_list(path: str) -> bytes | None:
    try:
        return os.getxattr(path, ACCESS_LIST)
    except OSError:  # it has none, or the file system knows none
        return None


class FileWatch:
    """Restores the modes that files with secrets had at first, if others may use one more than then.

    A handler cannot replace a file, so one that was replaced keeps its new mode. So does one whose mode is
    stricter now.
    """

    # Seconds between two looks.
    every = 60.0

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._first: dict[str, _Seen] = {}
        self._reported: dict[str, _Seen] = {}
        self._remind_at = clock.monotonic()
        for path, like in self._watched():
            with suppress(OSError):
                self._first_of(path, like, _Seen.at(path))

    def look(self) -> None:
        """Restore and report modes that were opened; report what handlers could open, once a day."""
        for path, like in self._watched():
            with suppress(OSError):  # it was removed meanwhile
                self._look_at(path, like)
        if self._settings.execution.sandbox == "require" and self._clock.monotonic() >= self._remind_at:
            self._remind_at = self._clock.monotonic() + REMIND_EVERY.total_seconds()
            if found := changeable(guarded(self._settings)):
                emit("files.changeable", path=found[0], files=len(found))

    def _watched(self) -> Iterator[tuple[str, str]]:
        """Each file and the folder with it, and the one whose mode it should have."""
        files, database = guarded(self._settings), self._settings.database.sqlite_file
        if database is not None and database.exists():
            # SQLite gives its journals, which come and go, the mode of the database.
            yield from ((f"{database}{journal}", str(database)) for journal in JOURNALS)
            files.append(str(database))
        folders = [os.path.dirname(os.path.abspath(path)) for path in files]
        yield from ((path, path) for path in dict.fromkeys([*files, *folders]))

    def _first_of(self, path: str, like: str, now: _Seen) -> _Seen:
        """The file as it was at first."""
        first = self._first.get(path)
        if first is None or first[:2] != now[:2]:
            of = now if path == like else self._first.get(like, now)
            first = self._first[path] = now._replace(mode=of.mode, access_list=of.access_list)
        return first

    def _look_at(self, path: str, like: str) -> None:
        now = _Seen.at(path)
        first = self._first_of(path, like, now)
        if not now.has_opened(first):
            self._reported.pop(path, None)
            return
        restored = True
        try:
            first.restore(path)
        except OSError:  # another account owns it: no handler did this
            restored = False
        if restored or self._reported.get(path) != now:
            self._reported[path] = now
            emit("files.opened", path=path, mode=f"{now.mode:04o}", restored=restored)
