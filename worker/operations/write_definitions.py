"""Close a definition: nothing of it is due any more, what waits is cancelled, its history stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.ids import DefinitionId, OrgId, new_id
from worker.operations import settle
from worker.operations.changes import differing
from worker.operations.plan import DefinitionChange
from worker.store import audit, backfills, definitions, edit_runs, orgs, templates
from worker.store.connection import database_now
from worker.store.database import Database
from worker.store.lists import definitions as definition_lists

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
        return definition_lists.definition(connection, org, name)


def end_closed(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> int:
    """Cancel what waits of a closed definition, and its backfills; how many runs that were."""
    backfills.cancel(connection, org_id, backfills.is_of(definition_id), at=database_now(connection))
    ours = edit_runs.is_of(definition_id)
    return len(edit_runs.end_waiting(connection, org_id, ours, reason="closed"))


def settle_touched(
    connection: Connection,
    changes: Iterable[DefinitionChange],
    *,
    at: datetime,
    also: Iterable[Mapping[str, Any]] = (),
) -> set[DefinitionId]:
    """Settle what is about to change, under the rules still in force; which definitions that are.

    All are locked. `also` are definitions whose org changes what is due.
    """
    touched = {change.before["id"]: change.before for change in changes if change.before}
    touched |= {row["id"]: row for row in also}
    settle.settle(connection, list(touched.values()), at=at)
    return set(touched)


def write_definitions(
    connection: Connection,
    changes: Sequence[DefinitionChange],
    *,
    settled: Iterable[DefinitionId],
    actor: str,
    at: datetime,
) -> None:
    """Write the changes and start everything that was settled or is new from now."""
    made = _write(connection, changes, actor, at)
    again = definitions.read_for_all_orgs(connection, settled)
    settle.start(connection, again, at=at)
    settle.start(connection, definitions.read_for_all_orgs(connection, made), at=at, inclusive=True)
    closed = [change for change in changes if change.action == "close" and change.before]
    for change in closed:
        if change.before:
            end_closed(connection, change.org_id, change.before["id"])
    own = [change for change in closed if change.template is None]
    templates.look_again_for_all_orgs(connection, {(change.org_id, change.name) for change in own})


def audit_entry(change: DefinitionChange) -> audit.Entry:
    """What the audit says of a change, its template named where one made it."""
    shown = change.shown()
    detail: Row = {key: {"before": before, "after": after} for key, (before, after) in shown.fields.items()}
    if change.template is not None:
        detail["template"] = change.template.name
    return audit.Entry(change.org_id, f"definition.{change.action}", f"{change.org} {change.name}", detail)


def _write(
    connection: Connection, changes: Sequence[DefinitionChange], actor: str, at: datetime
) -> set[DefinitionId]:
    """Write rows and revisions; returns the definitions that are new."""
    rows: list[Row] = []
    revisions: list[Row] = []
    for change in changes:
        before, template = change.before, change.template
        made_by: Row = {
            "template_id": template.id if template else None,
            "template_revision": template.revision if template else None,
        }
        if before is None:
            definition_id, revision = DefinitionId(new_id()), 1
            rows.append(
                {
                    "id": definition_id,
                    "org_id": change.org_id,
                    "name": change.name,
                    "revision": revision,
                    "enabled": change.enabled,
                    "created_at": at,
                    "updated_at": at,
                    **made_by,
                }
            )
        else:
            definition_id, revision = before["id"], before["revision"]
            values: Row = {"closed_at": at if change.action == "close" else None, **made_by}
            if change.action == "reopen":
                values["consecutive_failures"] = 0
            if change.action != "close":
                values["enabled"] = change.enabled
            if differing(before["spec"], change.spec):
                values["revision"] = revision = revision + 1
            definitions.change(
                connection, change.org_id, definition_id, values, at=at, revision=before["revision"]
            )
            if revision == before["revision"]:
                continue
        revisions.append(
            {
                "definition_id": definition_id,
                "revision": revision,
                "spec": dict(change.spec),
                "at": at,
                "by": actor,
            }
        )
    definitions.insert_for_all_orgs(connection, rows, revisions)
    return {row["id"] for row in rows}
