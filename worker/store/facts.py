"""Facts of the whole database: a name and a text each."""

from __future__ import annotations

from sqlalchemy import Connection, select

from worker.store import tables
from worker.store.upsert import upsert

_facts = tables.facts

# The release of the time zone database that the schedules were computed with.
ZONE_DATA = "tzdata"


def read(connection: Connection, name: str) -> str | None:
    """The fact, or None where nobody has set it."""
    return connection.execute(select(_facts.c.value).where(_facts.c.name == name)).scalar_one_or_none()


def write(connection: Connection, name: str, value: str) -> None:
    """Set a fact."""
    connection.execute(upsert(connection, _facts, ("name",), ("value",)), {"name": name, "value": value})
