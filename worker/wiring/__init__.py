"""Wiring: the composition root, the only package that names concrete classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.clock import SystemClock
from worker.errors import ConfigurationError
from worker.settings import Settings

if TYPE_CHECKING:
    # Most commands run without cryptography, and a host without a database.
    from worker.store.database import Database
    from worker.tokens.sealing import KeyRing


def open_database(settings: Settings) -> Database:
    """The configured database; it connects at the first query."""
    from worker.store.database import Database

    return Database.open(settings.database.url, clock=SystemClock(), role="cli")


def open_keyring(settings: Settings, *, database: Database | None = None) -> KeyRing:
    """The key ring of this installation.

    With `database`, on SQLite only, a missing key ring is generated if nothing is sealed yet. Raises
    ConfigurationError if it is missing or cannot be read.
    """
    from worker.operations.keys import check_ring
    from worker.tokens.sealing import KeyRing

    path = settings.keyring_file
    if database is not None and not path.exists():
        check_ring(database, None, path)
        if settings.database.sqlite_file is not None:
            return KeyRing.load_or_generate(path)
    return KeyRing.load(path)


def find_keyring(settings: Settings) -> KeyRing | None:
    """The key ring, or None; raises ConfigurationError if it exists and cannot be read."""
    from worker.tokens.sealing import KeyRing

    try:
        path = settings.keyring_file
    except ConfigurationError:
        return None
    return KeyRing.load(path) if path.exists() else None
