"""SQLite without waits for the disk, as the tests' PostgreSQL server: no test cuts the power.

A commit that waits takes some 4 ms of a busy disk and 0.2 ms of CPU time. What another process kills is in
the kernel's hands already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sqlalchemy import Connection, Engine, event

from worker.store.dialect import driver

DONE = "unsynced"


def begin() -> None:
    """For every connection of this process that is used from now on."""
    event.listen(Engine, "engine_connect", _turn_off)


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Connections that are made meanwhile are as the store makes them."""
    begun = event.contains(Engine, "engine_connect", _turn_off)
    if begun:
        event.remove(Engine, "engine_connect", _turn_off)
    try:
        yield
    finally:
        if begun:
            begin()


def _turn_off(connection: Connection) -> None:
    if connection.dialect.name == "sqlite" and DONE not in connection.info:
        connection.info[DONE] = True
        driver(connection).execute("PRAGMA synchronous = OFF")
