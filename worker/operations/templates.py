"""Templates: make, change and close their definitions, org by org in small batches; and run them now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, DefinitionError, NotFound, WorkerError
from worker.ids import ALL_ORGS, OrgId, TemplateId
from worker.kit.walks import rows_of
from worker.model.definitions.definition import to_spec
from worker.model.definitions.file import TemplateEntry, from_template_spec
from worker.operations.changes import (
    DefinitionChange,
    TemplateChange,
    TemplateRef,
    change_definitions,
    write_templates,
)
from worker.operations.runs import run_now
from worker.store import audit, definitions, templates
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import read as lists
from worker.store.lists.rows import ChangeOutcome, TemplateDetail
from worker.telemetry.events import emit

# Orgs that one transaction brings up to date.
BATCH = 200
# Definitions of a template that are read at a time.
PAGE = 500
ACTOR = "worker"


@dataclass(frozen=True, slots=True)
class Materialised:
    """What one batch did, and the progress of each template: (name, orgs done, all orgs)."""

    orgs: int = 0
    definitions: int = 0
    progress: Sequence[tuple[str, int, int]] = ()


def materialise(database: Database, *, limit: int = BATCH, actor: str = ACTOR) -> Materialised:
    """Bring the next orgs up to date with the templates, in one transaction; 0 `orgs` means all are.

    An org whose definitions cannot be computed is reported and skipped until it or a
    template changes, so that the others do not wait for it.
    """
    with database.autocommit() as connection:
        newest = templates.newest_change(connection)
        if not templates.is_any_org_behind(connection, newest) and not templates.unfinished(connection):
            return Materialised()
    try:
        with database.transaction() as connection:
            return _materialise(connection, actor=actor, at=database.now(connection), limit=limit)
    except WorkerError as error:
        if error.transient or limit == 1:
            raise
        return _one_by_one(database, limit, actor)


def materialise_first(connection: Connection, *, actor: str, at: datetime) -> None:
    """Update the first orgs in the caller's transaction; workers do the rest, and what fails here."""
    try:
        with connection.begin_nested():
            _materialise(connection, actor=actor, at=at, limit=BATCH)
    except WorkerError as error:
        if error.transient:
            raise


def _materialise(connection: Connection, *, actor: str, at: datetime, limit: int) -> Materialised:
    newest = templates.newest_change(connection)
    orgs = templates.lock_orgs_behind(connection, ALL_ORGS, newest, limit)
    # Read after the orgs are locked: a template that is missed here makes them behind again.
    stored = templates.every(connection) if orgs else []
    changes: list[DefinitionChange] = []
    try:
        with connection.begin_nested():
            changes = _plan(connection, orgs, stored) if orgs else []
            change_definitions(connection, changes, actor=actor, at=at)
    except WorkerError as error:
        if error.transient or limit > 1:
            raise
        # While it is locked: it counts as up to date, so that the others do not wait for it.
        emit("definition.failed", org=orgs[0]["code"], definition=None, error=error.message)
        changes = []
    templates.take_up(connection, orgs, newest)
    reached = [
        (dict(row), sum(org["templates_seen"] < row["change"] for org in orgs))
        for row in stored
        if row["materialised_at"] is None
    ]
    templates.progress(connection, [(row, count) for row, count in reached if count])
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
    """The changes that bring these orgs' definitions up to date."""
    refs = {row["name"]: TemplateRef(row["id"], row["name"], row["revision"]) for row in stored}
    entries = [
        from_template_spec(row["name"], row["selector"], row["spec"])
        for row in stored
        if row["closed_at"] is None
    ]
    specs = {entry.name: to_spec(entry.definition) for entry in entries}
    present: dict[OrgId, dict[str, Row]] = {org["id"]: {} for org in orgs}
    which = definitions.is_named(list(refs), or_made_by_template=True)
    for row in definitions.lock(connection, present, which):
        present[row["org_id"]][row["name"]] = row
    by_id = {ref.id: ref for ref in refs.values()}
    changes: list[DefinitionChange] = []
    for org in orgs:
        found = present[org["id"]]
        selected = [entry for entry in entries if _selects(entry, org)]
        for entry in selected:
            old = found.get(entry.name)
            if old is not None and old["closed_at"] is None and old["template_id"] is None:
                # The org has its own definition of that name, which takes precedence.
                continue
            named, enabled = (org["id"], org["code"], entry.name), entry.definition.enabled
            change = DefinitionChange.to_spec(*named, specs[entry.name], enabled, old, refs[entry.name])
            if change is not None:
                changes.append(change)
        kept = {entry.name for entry in selected}
        for row in found.values():
            template = by_id.get(row["template_id"])
            if row["closed_at"] is None and template is not None and row["name"] not in kept:
                changes.append(DefinitionChange.close(row, template))
    return changes


def _selects(entry: TemplateEntry, org: Row) -> bool:
    return org["state"] != "removed" and entry.selector.matches(tags=org["tags"], issuer=org["issuer"])


def _one_by_one(database: Database, limit: int, actor: str) -> Materialised:
    done = Materialised()
    for _ in range(limit):
        one = materialise(database, limit=1, actor=actor)
        if not one.orgs:
            break
        done = replace(one, orgs=done.orgs + 1, definitions=done.definitions + one.definitions)
    return done


def close_template(database: Database, name: str, *, actor: str) -> TemplateDetail:
    """Close a template and return it; its definitions close org by org. `apply` reopens it.

    Raises:
        NotFound: no such template.
        Conflict: it is closed already.
    """
    with database.transaction() as connection:
        before = templates.find(connection, name)
        if before is None:
            raise NotFound(
                f"there is no template {name}",
                fix="`templates list` lists the templates",
                sought=("template", name, None),
            )
        if before["closed_at"] is not None:
            raise Conflict(
                f"template {name} is closed already", fix="`apply` a file that has it opens it again"
            )
        now = database.now(connection)
        change = TemplateChange("close", before["id"], name, before, before["selector"], before["spec"])
        write_templates(connection, [change], actor=actor, at=now)
        audit.record(connection, [change.audit_entry()], at=now, actor=actor)
        materialise_first(connection, actor=actor, at=now)
        return lists.template(connection, ALL_ORGS, name)


def definitions_of(database: Database, template_id: TemplateId) -> Iterator[Row]:
    """The open definitions that a template made, a page at a time: id, org, name, paused_at."""
    return rows_of(
        database,
        lambda connection, after, limit: templates.definitions_of(
            connection, ALL_ORGS, template_id, after=after, limit=limit
        ),
        after=None,
        limit=PAGE,
    )


def run_template(
    database: Database,
    name: str,
    *,
    actor: str,
    request_key: str,
    params: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Iterator[ChangeOutcome]:
    """Run each definition of a template as it is taken, and yield the outcomes; paused ones are left out.

    A row has `id` and `state` of the new run, and `left`: why an org was left out, else None. The same
    `request_key` makes no second run, so an interrupted call can be repeated. With `dry_run` nothing
    is made. `params` and `typed` are those of `run_now`.

    Raises:
        NotFound: no such template.
        UsageError: an invalid request key.
    """
    with database.autocommit() as connection:
        template_id = TemplateId(lists.template(connection, ALL_ORGS, name)["id"])
    for row in definitions_of(database, template_id):
        outcome = ChangeOutcome(id=None, org=row["org"], definition=row["name"], state=None, left=None)
        if row["paused_at"] is not None:
            yield outcome | {"left": f"definition {row['org']}/{row['name']} is paused"}
        elif dry_run:
            yield outcome
        else:
            try:
                run = run_now(
                    database,
                    row["org"],
                    row["name"],
                    actor=actor,
                    request_key=request_key,
                    params=params,
                    typed=typed,
                )
                yield outcome | {"id": run["id"], "state": run["state"]}
            except (Conflict, NotFound, DefinitionError) as error:
                yield outcome | {"left": error.message}
