"""What the people and the stage of a simulation look up in its database."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select, text

from worker.store import tables
from worker.store.database import Database


def with_lease(database: Database) -> set[str]:
    query = "SELECT id FROM workers WHERE ended_at IS NULL"
    with database.autocommit() as connection:
        return {str(one) for one in connection.execute(text(query)).scalars()}


def unfinished(database: Database) -> int:
    with database.autocommit() as connection:
        return int(connection.execute(text("SELECT count(*) FROM live_runs")).scalar_one())


def open_batches(database: Database) -> int:
    """The requests that are not over, and the batches that something is to be done with."""
    query = (
        f"SELECT (SELECT count(*) FROM batch_items WHERE {tables.OPEN_ITEM})"
        f" + (SELECT count(*) FROM batches WHERE {tables.OPEN_BATCH})"
    )
    with database.autocommit() as connection:
        return int(connection.execute(text(query)).scalar_one())


_NAMED = (
    "FROM {table} r JOIN definitions d ON d.id = r.definition_id JOIN orgs o ON o.id = d.org_id "
    "WHERE o.code = :org AND d.name = :name ORDER BY r.id DESC LIMIT 1"
)


def newest_of(database: Database, org: str, name: str, ended: bool) -> str | None:
    table = "run_ends e JOIN runs r ON r.id = e.run_id" if ended else "live_runs r"
    query = "SELECT r.id " + _NAMED.replace("{table} r", table)
    with database.autocommit() as connection:
        found = connection.execute(text(query), {"org": org, "name": name}).scalar_one_or_none()
    return None if found is None else str(found)


def waiting_of(database: Database, org: str) -> list[str]:
    query = (
        "SELECT r.id FROM live_runs r JOIN orgs o ON o.id = r.org_id "
        "WHERE o.code = :org AND r.state = 'waiting' ORDER BY r.id"
    )
    with database.autocommit() as connection:
        return [str(one) for one in connection.execute(text(query), {"org": org}).scalars()]


def live_by_definition(database: Database, org: str) -> dict[str, int]:
    query = (
        "SELECT d.name, count(*) FROM live_runs r JOIN definitions d ON d.id = r.definition_id "
        "JOIN orgs o ON o.id = r.org_id WHERE o.code = :org GROUP BY d.name ORDER BY d.name"
    )
    with database.autocommit() as connection:
        return {str(name): int(count) for name, count in connection.execute(text(query), {"org": org})}


def open_waits(database: Database) -> list[tuple[str, str, int]]:
    query = (
        "SELECT w.run_id, w.name, w.occurrence FROM waits w JOIN live_runs r ON r.id = w.run_id "
        "WHERE w.answered_at IS NULL AND w.timed_out_at IS NULL AND w.name = 'approval' ORDER BY w.run_id"
    )
    with database.autocommit() as connection:
        return [(str(run), name, occurrence) for run, name, occurrence in connection.execute(text(query))]


def newest_parent(database: Database, org: str, name: str) -> str | None:
    """The newest run of a definition that no run has started."""
    query = (
        "SELECT r.id FROM runs r JOIN definitions d ON d.id = r.definition_id JOIN orgs o ON o.id = d.org_id "
        "WHERE o.code = :org AND d.name = :name AND r.origin <> 'child' ORDER BY r.id DESC LIMIT 1"
    )
    with database.autocommit() as connection:
        found = connection.execute(text(query), {"org": org, "name": name}).scalar_one_or_none()
    return None if found is None else str(found)


def late_definitions(database: Database) -> list[tuple[str, datetime, datetime]]:
    """The late definitions, the scheduled time that each is late for, and the first deadline that passed."""
    late = tables.late_definitions.c
    query = select(late.definition_id, late.scheduled_for, late.late_at).order_by(late.definition_id)
    with database.autocommit() as connection:
        return [(str(id_), at, late_at) for id_, at, late_at in connection.execute(query)]
