"""Wiring: the composition root, the only room that names concrete classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.clock import SystemClock
from worker.errors import ConfigurationError
from worker.settings import Settings
from worker.store.database import Database

if TYPE_CHECKING:
    # A list is printed without cryptography.
    from worker.tokens.sealing import KeyRing


def open_database(settings: Settings, *, role: str = "cli") -> Database:
    """The database that `worker.toml` names; nothing is connected yet."""
    return Database.open(settings.database.url, clock=SystemClock(), role=role)


def open_keyring(settings: Settings, *, database: Database | None = None) -> KeyRing:
    """The key ring of this installation.

    With `database`, and on SQLite only, it is made at first need: where nothing is sealed yet.

    Raises:
        ConfigurationError: there is none; the message says what to do.
    """
    from worker.operations.keys import check_ring
    from worker.tokens.sealing import KeyRing

    path = settings.keyring_file
    if database is not None and not path.exists():
        check_ring(database, None, str(path))
        if settings.database.sqlite_file is not None:
            return KeyRing.load_or_generate(path)
    return KeyRing.load(path)


def find_keyring(settings: Settings) -> KeyRing | None:
    """The key ring, or None where there is none.

    Raises:
        ConfigurationError: it is there and cannot be read.
    """
    from worker.tokens.sealing import KeyRing

    try:
        path = settings.keyring_file
    except ConfigurationError:
        return None
    return KeyRing.load(path) if path.exists() else None


def read_catalogue_now(settings: Settings, database: Database) -> None:
    """Ask the installed distributions what they offer, where the database has not heard of them yet."""
    from worker.operations.confinement import confinement_of
    from worker.wiring.catalogue import store_unknown

    command = confinement_of(settings).describe
    passed = settings.execution.pass_environment
    store_unknown(database, SystemClock(), pass_environment=passed, command=command)


def run_worker(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT; gives the process's exit code.

    Raises:
        Busy: another worker holds the SQLite file.
        ConfigurationError: the schema is another version's, or an issuer or key is not usable.
    """
    # Imported here: the commands of the CLI need none of it.
    from worker.wiring.process import run

    return run(settings)
