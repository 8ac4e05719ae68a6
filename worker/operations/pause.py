"""Pause a definition, with a note, and resume it: nothing that was due meanwhile is replayed."""

from __future__ import annotations

from typing import Any

from worker.errors import Conflict
from worker.operations import settle
from worker.store import audit, definition_listing, definitions, orgs
from worker.store.database import Database

Row = dict[str, Any]


def pause_definition(database: Database, org: str, name: str, *, actor: str, note: str | None = None) -> Row:
    """Pause one definition and return it; what was due before is settled, what runs goes on.

    Pausing it again only changes who, when and why.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is closed.
    """
    return _set(database, org, name, actor=actor, pause=True, note=note)


def resume_definition(database: Database, org: str, name: str, *, actor: str) -> Row:
    """Let a paused definition be due again, from now on, and return it.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is closed, or not paused.
    """
    return _set(database, org, name, actor=actor, pause=False, note=None)


def _set(database: Database, org: str, name: str, *, actor: str, pause: bool, note: str | None) -> Row:
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        if row["closed_at"] is not None:
            raise Conflict(f"definition {org}/{name} is closed", fix="`apply` a file that has it")
        if not pause and row["paused_at"] is None:
            raise Conflict(
                f"definition {org}/{name} is not paused",
                fix=f"`definitions next {org} {name}` says when it is due",
            )
        now = database.now(connection)
        values: Row = {
            "paused_at": now if pause else None,
            "paused_by": actor if pause else None,
            "pause_note": note,
        }
        if not pause:
            values["consecutive_failures"] = 0
        with settle.settled(connection, row, at=now):
            definitions.change(connection, org_id, row["id"], values, at=now, revision=row["revision"])
        action = "definition.pause" if pause else "definition.resume"
        entry = audit.Entry(org_id, action, f"{org} {name}", {"note": note} if note else None)
        audit.record(connection, [entry], at=now, actor=actor)
        return definition_listing.definition(connection, org, name)
