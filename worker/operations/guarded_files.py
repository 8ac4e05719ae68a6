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
# Rights of group and others.
OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO
# Capabilities of root by which a process changes the mode of what it does not own: CHOWN, FOWNER, SETUID.
_OF_ROOT = 1 << 0 | 1 << 3 | 1 << 7


def guarded(settings: Settings) -> list[str]:
    """The existing files with secrets that the sandbox requires to be closed for good; the database is not.

    They are the key ring, the settings, and a host's token.
    """
    named = [settings.config_file, settings.host.token_file, settings.attempts.key, settings.temporal.key]
    named.append(_key_ring(settings))
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
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _key_ring(settings: Settings) -> str:
    with suppress(ConfigurationError):  # none is configured
        return str(settings.keyring_file.absolute())
    return ""


class _Seen(NamedTuple):
    """A file, and its mode."""

    device: int
    inode: int
    mode: int

    @classmethod
    def at(cls, path: str) -> _Seen:
        found = os.stat(path)
        return cls(found.st_dev, found.st_ino, stat.S_IMODE(found.st_mode))


class FileWatch:
    """Restores the modes that files with secrets had at first, if others may use one more than then.

    A handler cannot replace a file, so one that was replaced keeps its new mode. A stricter mode is left
    alone.
    """

    # Seconds between two looks.
    every = 60.0

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._first: dict[str, _Seen] = {}
        self._reported: dict[str, int] = {}
        self._remind_at = clock.monotonic()
        for path, like in self._watched():
            with suppress(OSError):
                self._mode_of(path, like, _Seen.at(path))

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
        """Each file and folder, and the one whose mode it should have."""
        ring, database = _key_ring(self._settings), self._settings.database.sqlite_file
        files = guarded(self._settings)
        folders = [os.path.dirname(ring)] if ring in files else []
        if database is not None and database.exists():
            # SQLite gives its journals, which come and go, the mode of the database.
            yield from ((f"{database}{journal}", str(database)) for journal in JOURNALS)
            folders.append(str(database.absolute().parent))
        yield from ((path, path) for path in dict.fromkeys([*files, *folders]))

    def _mode_of(self, path: str, like: str, now: _Seen) -> int:
        """The mode that the file had at first."""
        first = self._first.get(path)
        if first is None or first[:2] != now[:2]:
            mode = now.mode if path == like or like not in self._first else self._first[like].mode
            first = self._first[path] = now._replace(mode=mode)
        return first.mode

    def _look_at(self, path: str, like: str) -> None:
        now = _Seen.at(path)
        mode = self._mode_of(path, like, now)
        if not now.mode & OF_OTHERS & ~mode:
            self._reported.pop(path, None)
            return
        restored = True
        try:
            os.chmod(path, mode)
        except OSError:  # another account owns it: no handler did this
            restored = False
        if restored or self._reported.get(path) != now.mode:
            self._reported[path] = now.mode
            emit("files.opened", path=path, mode=f"{now.mode:04o}", restored=restored)
