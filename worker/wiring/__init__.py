"""Wiring: what processes and commands build from the settings, such as the database and the key ring."""

from __future__ import annotations

import os
import pwd
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from worker.clock import SystemClock
from worker.errors import ConfigurationError
from worker.ids import ALL_ORGS
from worker.settings import Settings

if TYPE_CHECKING:
    # Most commands run without cryptography, and a host without a database.
    from worker.store.database import Database
    from worker.store.dialect import Row
    from worker.tokens.sealing import KeyRing


def os_user() -> str:
    """The OS user of this process, or its number if it has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def open_database(settings: Settings) -> Database:
    """The configured database; it connects at the first query."""
    from worker.store.database import Database

    return Database.open(settings.database.url, clock=SystemClock(), role="cli")


def open_keyring(settings: Settings, *, database: Database | None = None) -> KeyRing:
    """The key ring of this installation.

    With `database`, on SQLite only, a missing key ring is generated if nothing is sealed yet. Raises
    ConfigurationError if it is missing or cannot be read.
    """
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


def list_keys(database: Database, ring: KeyRing | None) -> list[Row]:
    """A row for each key of the ring and of the database, with the number of secrets that it seals."""
    from worker.store import org_secrets

    with database.autocommit() as connection:
        counts = org_secrets.sealed_by_key(connection, ALL_ORGS)
    ids = ring.key_ids if ring else ()
    return [
        {
            "id": key_id,
            "in_ring": key_id in ids,
            "seals": ring is not None and key_id == ring.sealing_key_id,
            "active": counts.get(key_id, Counter())["active"],
            "retired": counts.get(key_id, Counter())["retired"],
        }
        for key_id in (*ids, *sorted(counts.keys() - set(ids)))
    ]


def check_ring(database: Database, ring: KeyRing | None, path: Path) -> None:
    """Refuse to continue if none of the keys that seal active secrets is in the ring at `path`.

    Raises:
        ConfigurationError: the ring is missing, or is the wrong one.
    """
    rows = [row for row in list_keys(database, ring) if row["active"]]
    # A command that seals the first secret of a database makes the ring before, maybe just now.
    missed = ring is None and path.exists()
    if rows and not missed and not any(row["in_ring"] for row in rows):
        count = sum(row["active"] for row in rows)
        raise ConfigurationError(
            f"the database has {count} sealed secrets, and {path} has none of their keys",
            fix="put the key ring back; if it is lost, `keys generate --anew` makes a new one,"
            " and each org needs its secret again (`credentials add`)",
        )
