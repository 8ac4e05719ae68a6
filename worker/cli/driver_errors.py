"""Database errors in the command line's words: not a database file, a login without the right."""

from __future__ import annotations

import sqlite3

from worker.errors import AccessDenied, ConfigurationError, WorkerError

_NO_DATABASE = sqlite3.SQLITE_NOTADB
_DAMAGED = sqlite3.SQLITE_CORRUPT


def in_our_words(error: Exception) -> WorkerError | None:
    """The error that a driver's own one stands for; None where it is not known, and so nobody expected it."""
    cause = getattr(error, "orig", None) or error
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code == _NO_DATABASE:
            return ConfigurationError(
                "the file of database.url is no SQLite database",
                fix="name another file; where it was one, restore it from a backup",
            )
        if code == _DAMAGED:
            return ConfigurationError(
                f"the database is damaged: {said}", fix="stop the worker, and restore it from a backup"
            )
    # By name, so that SQLite alone needs no psycopg.
    if type(cause).__module__.startswith("psycopg") and type(cause).__name__ == "InsufficientPrivilege":
        return AccessDenied(
            f"the database's login may not do this: {said}",
            fix="give it the rights of a worker: docs/operating/postgresql.md says which; "
            "`db upgrade` needs database.owner_url",
        )
    return None
