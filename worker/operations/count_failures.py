"""Count a definition's failures one after the other, and pause it when they are as many as it allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from worker.errors import Unavailable, WorkerError
from worker.ids import DefinitionId, OrgId
from worker.operations import settle
from worker.store import audit, definitions, run_ends
from worker.store.database import Database
from worker.telemetry.events import emit

ACTOR = "worker"


def count_failures(database: Database, org_id: OrgId, definition_id: DefinitionId) -> int | None:
    """How many of the definition's newest runs failed or were refused, one after the other.

    Backfills, cancelled and skipped runs do not count; a success, an edit, a pause and a
    resume begin the count anew. At `pause_after_failures` the definition is paused,
    with a note that names the last run, an audit row and an event. None where it must
    be and cannot, for example since its schedule does not compute; an event tells of that, too.
    """
    with database.autocommit() as connection:
        row = definitions.find_by_id(connection, org_id, definition_id)
        if row is None:
            return 0
        failed = _failed(connection, row)
        if failed == row["consecutive_failures"] and not _must_pause(row, failed):
            return failed
    try:
        with database.transaction() as connection:
            row = definitions.require_by_id(connection, org_id, definition_id)
            failed = _failed(connection, row)
            definitions.set_failures(connection, org_id, definition_id, failed)
            pauses = _must_pause(row, failed)
            if pauses:
                _pause(connection, row, failed, database)
    except Unavailable:
        raise
    except WorkerError as error:
        emit("definition.failed", org=row["org"], definition=row["name"], error=error.message)
        return None
    if pauses:
        emit("definition.paused", org=row["org"], definition=row["name"], failures=failed)
    return failed


def _failed(connection: Connection, row: Mapping[str, Any]) -> int:
    most = row["spec"].get("pause_after_failures")
    if most is None or row["closed_at"] is not None:
        return 0
    return run_ends.failed_in_a_row(
        connection, row["org_id"], row["id"], since=row["updated_at"], most=int(most)
    )


def _must_pause(row: Mapping[str, Any], failed: int) -> bool:
    most = row["spec"].get("pause_after_failures")
    return most is not None and failed >= most and row["paused_at"] is None and row["closed_at"] is None


def _pause(connection: Connection, row: Mapping[str, Any], failed: int, database: Database) -> None:
    org_id, now = row["org_id"], database.now(connection)
    last = run_ends.last_failed(connection, org_id, row["id"])
    note = f"{failed} failures one after the other, the last of them run {last}"
    with settle.settled(connection, row, at=now):
        values = {"paused_at": now, "paused_by": ACTOR, "pause_note": note}
        definitions.change(connection, org_id, row["id"], values, at=now, revision=row["revision"])
    entry = audit.Entry(org_id, "definition.pause", f"{row['org']} {row['name']}", {"note": note})
    audit.record(connection, [entry], at=now, actor=ACTOR)
