"""Templates: makes, changes and closes a template's definitions, org by org in small batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import to_spec
from worker.definitions.templates import TemplateEntry, from_template_spec
from worker.errors import Conflict, NotFound, WorkerError
from worker.operations.changes import Action, TemplateChange, differing, template_audit_entry, write_templates
from worker.operations.plan import DefinitionChange, TemplateRef
from worker.operations.write_definitions import audit_entry, settle_touched, write_definitions
from worker.store import audit, definitions, templates
from worker.store.database import Database
from worker.store.lists import definitions as definition_lists
from worker.telemetry.events import emit

Row = Mapping[str, Any]

# Orgs that one transaction carries to the newest templates.
BATCH = 200
ACTOR = "worker"


@dataclass(frozen=True, slots=True)
class Materialised:
    """What one batch did, and how far each template has got: (name, orgs done, orgs in all)."""

    orgs: int = 0
    definitions: int = 0
    progress: Sequence[tuple[str, int, int]] = ()


def materialise(database: Database, *, limit: int = BATCH) -> Materialised:
    """Carry the next orgs to the newest templates, in one transaction; with 0 `orgs` nothing is left.

    An org whose definitions cannot be computed is told and left until it or a
    template changes: it does not keep the others waiting.
    """
    with database.autocommit() as connection:
        newest = templates.newest_change(connection)
        if not templates.is_any_org_behind(connection, newest) and not templates.unfinished(connection):
            return Materialised()
    try:
        with database.transaction() as connection:
            return _materialise(connection, actor=ACTOR, at=database.now(connection), limit=limit)
    except WorkerError as error:
        if error.transient:
            raise
        if limit > 1:
            return _one_by_one(database, limit)
        return _left_out(database, error)


def materialise_first(connection: Connection, *, actor: str, at: datetime) -> None:
    """Begin with what the caller's transaction has changed; the workers do what is left, or fails here."""
    try:
        with connection.begin_nested():
            _materialise(connection, actor=actor, at=at, limit=BATCH)
    except WorkerError as error:
        if error.transient:
            raise


def _materialise(connection: Connection, *, actor: str, at: datetime, limit: int) -> Materialised:
    """Carry the next orgs to the newest templates, inside the caller's transaction."""
    newest = templates.newest_change(connection)
    orgs = templates.lock_orgs_behind_for_all_orgs(connection, newest, limit)
    # Read after the orgs are locked: a template that is missed here makes them look again.
    stored = templates.every(connection) if orgs else []
    changes = _plan(connection, orgs, stored) if orgs else []
    settled = settle_touched(connection, changes, at=at)
    write_definitions(connection, changes, settled=settled, actor=actor, at=at)
    audit.record(connection, [audit_entry(change) for change in changes], at=at, actor=actor)
    templates.take_up_for_all_orgs(connection, orgs, newest)
    templates.progress(connection, _reached(orgs, stored))
    unfinished = templates.unfinished(connection)
    if not templates.is_any_org_behind(connection, newest):
        for template in unfinished:
            if template["change"] <= newest:
                templates.finish(connection, template, at=at)
                template["orgs_done"] = template["orgs_total"]
    return Materialised(
        len(orgs),
        len(changes),
        [(template["name"], template["orgs_done"], template["orgs_total"]) for template in unfinished],
    )


def _plan(connection: Connection, orgs: Sequence[Row], stored: Sequence[Row]) -> list[DefinitionChange]:
    """What the definitions of these orgs are to be, where that is not what they are."""
    refs = {row["name"]: TemplateRef(row["id"], row["name"], row["revision"]) for row in stored}
    entries = [
        from_template_spec(row["name"], row["selector"], row["spec"])
        for row in stored
        if row["closed_at"] is None
    ]
    there = {
        (row["org_id"], row["name"]): row
        for row in definitions.lock_named_for_all_orgs(
            connection, [org["id"] for org in orgs], list(refs), made_by_template=True
        )
    }
    names = {ref.id: ref for ref in refs.values()}
    changes: list[DefinitionChange] = []
    for org in orgs:
        meant = [entry for entry in entries if _means(entry, org)]
        for entry in meant:
            row = there.get((org["id"], entry.name))
            change = _change(org, entry, refs[entry.name], row)
            if change is not None:
                changes.append(change)
        kept = {entry.name for entry in meant}
        changes.extend(
            DefinitionChange(
                "close", org["id"], org["code"], row["name"], row, row["spec"], row["enabled"], template
            )
            for row in there.values()
            if row["org_id"] == org["id"]
            and row["closed_at"] is None
            and (template := names.get(row["template_id"])) is not None
            and row["name"] not in kept
        )
    return changes


def _means(entry: TemplateEntry, org: Row) -> bool:
    return org["state"] != "removed" and entry.selector.matches(tags=org["tags"], issuer=org["issuer"])


def _change(org: Row, entry: TemplateEntry, ref: TemplateRef, row: Row | None) -> DefinitionChange | None:
    wanted = entry.definition_for(org["code"])
    spec = to_spec(wanted)
    action: Action = "change"
    if row is None:
        action = "add"
    elif row["closed_at"] is not None:
        action = "reopen"
    elif row["template_id"] is None:
        # The org has a definition of its own by that name, which stands.
        return None
    elif not differing(row["spec"], spec) and row["enabled"] == wanted.enabled:
        return None
    return DefinitionChange(action, org["id"], org["code"], entry.name, row, spec, wanted.enabled, ref)


def _reached(orgs: Sequence[Row], stored: Sequence[Row]) -> list[tuple[dict[str, Any], int]]:
    """How many of these orgs had not taken up the last change of each template."""
    counts = [
        (dict(row), sum(org["templates_seen"] < row["change"] for org in orgs))
        for row in stored
        if row["materialised_at"] is None
    ]
    return [(row, count) for row, count in counts if count]


def _one_by_one(database: Database, limit: int) -> Materialised:
    done = Materialised()
    for _ in range(limit):
        one = materialise(database, limit=1)
        if not one.orgs:
            break
        done = Materialised(done.orgs + 1, done.definitions + one.definitions, one.progress)
    return done


def _left_out(database: Database, error: WorkerError) -> Materialised:
    """Pass over the org that comes first, since its definitions cannot be computed."""
    with database.transaction() as connection:
        newest = templates.newest_change(connection)
        orgs = templates.lock_orgs_behind_for_all_orgs(connection, newest, 1)
        templates.take_up_for_all_orgs(connection, orgs, newest)
    for org in orgs:
        emit("definition.failed", org=org["code"], definition=None, error=error.message)
    return Materialised(orgs=len(orgs))


TemplateRow = dict[str, Any]


def close_template(database: Database, name: str, *, actor: str) -> TemplateRow:
    """Close a template and return it; its definitions follow, org by org. `apply` opens it again.

    Raises:
        NotFound: there is no such template.
        Conflict: it is closed already.
    """
    with database.transaction() as connection:
        before = templates.find(connection, name)
        if before is None:
            raise NotFound(f"there is no template {name}", fix="`templates list` names the templates")
        if before["closed_at"] is not None:
            raise Conflict(
                f"template {name} is closed already", fix="`apply` a file that has it opens it again"
            )
        now = database.now(connection)
        change = TemplateChange("close", before["id"], name, before, before["selector"], before["spec"])
        write_templates(connection, [change], actor=actor, at=now)
        audit.record(connection, [template_audit_entry(change)], at=now, actor=actor)
        materialise_first(connection, actor=actor, at=now)
        return definition_lists.template_for_all_orgs(connection, name)
