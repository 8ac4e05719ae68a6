"""Close a definition: nothing of it is due any more, what waits is cancelled, its history stays."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.ids import DefinitionId, OrgId
from worker.operations import settle
from worker.store import audit, backfills, definition_listing, definitions, edit_runs, orgs, templates
from worker.store.connection import database_now
from worker.store.database import Database

Row = dict[str, Any]


def close_definition(database: Database, org: str, name: str, *, actor: str) -> Row:
    """Close one definition and return it; a run that is on goes on.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is closed already, or a template made it.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        if row["closed_at"] is not None:
            raise Conflict(
                f"definition {org}/{name} is closed already", fix="`apply` a file that has it opens it again"
            )
        if row["template_id"] is not None:
            raise Conflict(
                f"definition {org}/{name} is made by a template",
                fix="take the org out of the template's selector, or close the template",
            )
        now = database.now(connection)
        with settle.settled(connection, row, at=now):
            definitions.change(
                connection, org_id, row["id"], {"closed_at": now}, at=now, revision=row["revision"]
            )
        ended = end_closed(connection, org_id, row["id"])
        templates.look_again_for_all_orgs(connection, {(org_id, name)})
        entry = audit.Entry(org_id, "definition.close", f"{org} {name}", {"cancelled": ended})
        audit.record(connection, [entry], at=now, actor=actor)
        return definition_listing.definition(connection, org, name)


def end_closed(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> int:
    """Cancel what waits of a closed definition, and its backfills; how many runs that were."""
    backfills.cancel(connection, org_id, backfills.is_of(definition_id), at=database_now(connection))
    ours = edit_runs.is_of(definition_id)
    return len(edit_runs.end_waiting(connection, org_id, ours, reason="closed"))
