"""Apply a file of orgs and definitions: all of it or nothing, and nothing twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.definitions.file import DefinitionsFile
from worker.operations import changes
from worker.operations.changes import Change, write_templates
from worker.operations.plan import ApplyPlan, OrgChange, make_plan
from worker.operations.templates import materialise_first
from worker.operations.write_definitions import audit_entry, settle_touched, write_definitions
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
    insecure_origins: Collection[str] = (),
    issuers: Collection[str] | None = None,
) -> list[Change]:
    """Make the database say what the file says, in one transaction; returns what that changed.

    The same file again changes nothing. `prune` closes definitions of the orgs named
    in the file that it no longer has, but none that a template made. A pause and
    the state of an org are never lifted. What templates make follows in the same
    transaction for the first orgs, and in the workers' for all others. `inline` are the distributions whose
    handlers the operator lets run inline, `insecure_origins` the http origins that may be `api_origins`,
    `issuers` those of `worker.toml`. With `dry_run` everything is checked and nothing written.

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
            insecure_origins=insecure_origins,
            issuers=issuers,
        )
        if not dry_run:
            _carry_out(connection, plan, actor=actor, at=database.now(connection))
        return plan.shown()


def _carry_out(connection: Connection, plan: ApplyPlan, *, actor: str, at: datetime) -> None:
    moved: list[Row] = []
    for org in plan.orgs:
        if org.before and "timezone" in org.new:
            moved += definitions.lock_org(connection, org.id)
    settled = settle_touched(connection, plan.definitions, at=at, also=moved)
    _write_orgs(connection, plan.orgs, at)
    write_definitions(connection, plan.definitions, settled=settled, actor=actor, at=at)
    write_templates(connection, plan.templates, actor=actor, at=at)
    trail = [
        *map(_org_entry, plan.orgs),
        *map(changes.template_audit_entry, plan.templates),
        *map(audit_entry, plan.definitions),
    ]
    audit.record(connection, trail, at=at, actor=actor)
    materialise_first(connection, actor=actor, at=at)


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


def _org_entry(change: OrgChange) -> audit.Entry:
    action = "org.add" if change.before is None else "org.change"
    return audit.Entry(change.id, action, change.code, dict(change.new))
