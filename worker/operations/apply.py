"""Apply a file of orgs and definitions: all of it or nothing, and nothing twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.definitions.file import DefinitionsFile
from worker.ids import DefinitionId, new_id
from worker.operations import settle
from worker.operations.changes import Change, differing
from worker.operations.close import end_closed
from worker.operations.plan import DefinitionChange, OrgChange, Plan, make_plan
from worker.store import audit, definitions, orgs
from worker.store.database import Database

Row = dict[str, Any]


def apply(
    database: Database,
    file: DefinitionsFile,
    *,
    actor: str,
    dry_run: bool = False,
    prune: bool = False,
    allow_unknown_handlers: bool = False,
    inline: Collection[str] = (),
    issuers: Collection[str] | None = None,
) -> list[Change]:
    """Make the database say what the file says, in one transaction; returns what that changed.

    The same file again changes nothing. `prune` closes definitions of the orgs named
    in the file that it no longer has, but none that a template made. A pause and
    the state of an org are never lifted. `inline` are the distributions whose
    handlers the operator lets run inline, `issuers` those of `worker.toml`. With
    `dry_run` everything is checked and nothing written.

    Raises:
        DefinitionError: names the entry and field that cannot be accepted; nothing was changed.
    """
    with database.transaction() as connection:
        plan = make_plan(
            connection,
            file,
            prune=prune,
            allow_unknown=allow_unknown_handlers,
            inline=inline,
            issuers=issuers,
        )
        if not dry_run:
            _carry_out(connection, plan, actor=actor, at=database.now(connection))
        return plan.shown()


def _carry_out(connection: Connection, plan: Plan, *, actor: str, at: datetime) -> None:
    moved = [change.before for change in plan.orgs if change.before and "timezone" in change.new]
    touched = {change.before["id"]: change.before for change in plan.definitions if change.before}
    for org in moved:
        touched |= {row["id"]: row for row in definitions.lock_org(connection, org["id"])}
    settle.settle(connection, list(touched.values()), at=at)
    _write_orgs(connection, plan.orgs, at)
    made = _write_definitions(connection, plan.definitions, actor, at)
    _restart(connection, plan, set(touched), made, at)
    for change in plan.definitions:
        if change.action == "close" and change.before:
            end_closed(connection, change.org_id, change.before["id"])
    audit.record(
        connection, [*map(_org_entry, plan.orgs), *map(_entry, plan.definitions)], at=at, actor=actor
    )


def _write_orgs(connection: Connection, changes: Sequence[OrgChange], at: datetime) -> None:
    orgs.insert_for_all_orgs(
        connection,
        [
            {"id": change.id, "code": change.code, "created_at": at, "updated_at": at, **change.new}
            for change in changes
            if change.before is None
        ],
    )
    for change in changes:
        if change.before is not None:
            orgs.change(connection, change.id, change.new, at=at)


def _write_definitions(
    connection: Connection, changes: Sequence[DefinitionChange], actor: str, at: datetime
) -> set[DefinitionId]:
    """Write rows and revisions; returns the definitions that are new."""
    rows: list[Row] = []
    revisions: list[Row] = []
    for change in changes:
        before = change.before
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
                }
            )
        else:
            definition_id, revision = before["id"], before["revision"]
            values: Row = {"closed_at": at if change.action == "close" else None}
            if change.action == "reopen":
                values |= {"template_id": None, "template_revision": None, "consecutive_failures": 0}
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


def _restart(
    connection: Connection, plan: Plan, touched: set[DefinitionId], made: set[DefinitionId], at: datetime
) -> None:
    org_ids = {change.org_id for change in plan.definitions} | {change.id for change in plan.orgs}
    rows = definitions.lock_for_all_orgs(connection, org_ids) if touched or made else []
    settle.start(connection, [row for row in rows if row["id"] in touched], at=at)
    settle.start(connection, [row for row in rows if row["id"] in made], at=at, inclusive=True)


def _org_entry(change: OrgChange) -> audit.Entry:
    action = "org.add" if change.before is None else "org.change"
    return audit.Entry(change.id, action, change.code, dict(change.new))


def _entry(change: DefinitionChange) -> audit.Entry:
    shown = change.shown()
    return audit.Entry(
        change.org_id,
        f"definition.{change.action}",
        f"{change.org} {change.name}",
        {key: {"before": before, "after": after} for key, (before, after) in shown.fields.items()},
    )
