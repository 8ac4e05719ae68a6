"""What a file asks for against what is stored: every check, and the changes to make. Writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import Definition, to_spec
from worker.definitions.file import DefinitionsFile
from worker.definitions.origins import check_encrypted
from worker.errors import DefinitionError, UsageError
from worker.ids import OrgId, TemplateId, new_id
from worker.operations import org_entry
from worker.operations.changes import Action, Change, TemplateChange, differing, plan_template
from worker.operations.handlers import Handlers
from worker.orgs import OrgEntry
from worker.store import definitions, orgs

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OrgChange:
    """An org to add (`before` None), or to change to `new` columns."""

    id: OrgId
    code: str
    before: Row | None
    new: Mapping[str, Any]

    def shown(self) -> Change:
        before = {} if self.before is None else {name: self.before[name] for name in self.new}
        return Change(
            "org",
            "add" if self.before is None else "change",
            self.code,
            self.code,
            differing(before, self.new),
        )


@dataclass(frozen=True, slots=True)
class TemplateRef:
    """The revision of a template that makes a definition what it is."""

    id: TemplateId
    name: str
    revision: int


@dataclass(frozen=True, slots=True)
class DefinitionChange:
    """A definition to add (`before` None), change, reopen or close; `spec` is what it is to be.

    `template` is the one that makes it so; None for an org's own.
    """

    action: Action
    org_id: OrgId
    org: str
    name: str
    before: Row | None
    spec: Mapping[str, Any]
    enabled: bool
    template: TemplateRef | None = None

    def shown(self) -> Change:
        if self.action == "close":
            return Change("definition", "close", self.org, self.name)
        before = {} if self.before is None else {**self.before["spec"], "enabled": self.before["enabled"]}
        after = {**self.spec, "enabled": self.enabled}
        return Change("definition", self.action, self.org, self.name, differing(before, after))


@dataclass(slots=True)
class ApplyPlan:
    """The changes in the order in which they are shown."""

    orgs: list[OrgChange] = field(default_factory=list)
    templates: list[TemplateChange] = field(default_factory=list)
    definitions: list[DefinitionChange] = field(default_factory=list)

    def shown(self) -> list[Change]:
        orgs, templates = [each.shown() for each in self.orgs], [each.shown() for each in self.templates]
        return [*orgs, *templates, *(each.shown() for each in self.definitions)]


def make_plan(
    connection: Connection,
    file: DefinitionsFile,
    *,
    prune: bool,
    allow_unknown: bool,
    inline: Collection[str],
    insecure_origins: Collection[str],
    issuers: Collection[str] | None,
) -> ApplyPlan:
    """Check the whole file and compare it with what is stored, which stays locked.

    Raises:
        DefinitionError: names the entry and the field that cannot be accepted.
    """
    plan = ApplyPlan()
    named = {entry.code for entry in file.orgs} | {each.org for each in file.definitions}
    there = orgs.find_for_all_orgs(connection, named, lock=True)
    ids: dict[str, OrgId] = {code: row["id"] for code, row in there.items()}
    for entry in file.orgs:
        change = _org_change(entry, there.get(entry.code), issuers)
        if change is not None:
            plan.orgs.append(change)
            ids[entry.code] = change.id
    stored = {
        (row["org"], row["name"]): row
        for row in definitions.lock_for_all_orgs(connection, (row["id"] for row in there.values()))
    }
    handlers = Handlers(connection)
    for each in file.definitions:
        entry_name = f"definition {each.org}/{each.name}"
        if each.org not in ids:
            raise DefinitionError(
                f"{entry_name}, org: there is no org {each.org}",
                entry=entry_name,
                field="org",
                fix=f'add [[org]] code = "{each.org}" to the file, or `orgs add {each.org}`',
            )
        handlers.check(each, entry_name, inline=inline, allow_unknown=allow_unknown)
        check_encrypted(each.api_origins, insecure_origins, entry=entry_name)
        change_of = _definition_change(each, entry_name, ids[each.org], stored.get((each.org, each.name)))
        if change_of is not None:
            plan.definitions.append(change_of)
    for template in sorted(file.templates, key=lambda template: template.name):
        change_of_template = plan_template(
            connection, template, handlers, inline=inline, allow_unknown=allow_unknown, issuers=issuers
        )
        check_encrypted(template.definition.api_origins, insecure_origins, entry=f"template {template.name}")
        if change_of_template is not None:
            plan.templates.append(change_of_template)
    if prune:
        kept = {(each.org, each.name) for each in file.definitions}
        plan.definitions.extend(_closed(row for key, row in stored.items() if key not in kept))
    return plan


def _org_change(entry: OrgEntry, before: Row | None, issuers: Collection[str] | None) -> OrgChange | None:
    entry_name = f"org {entry.code}"
    try:
        org_entry.check(entry, issuers)
    except UsageError as error:
        raise DefinitionError(error.message, entry=entry_name, fix=error.fix) from None
    if before is None:
        return OrgChange(OrgId(new_id()), entry.code, None, org_entry.columns(entry))
    if before["state"] == "removed":
        raise DefinitionError(
            f"{entry_name} was removed",
            entry=entry_name,
            field="code",
            fix=f"take it out of the file, or bring it back with `orgs add {entry.code}`",
        )
    new = org_entry.changed(before, entry)
    return OrgChange(before["id"], entry.code, before, new) if new else None


def _definition_change(
    definition: Definition, entry: str, org_id: OrgId, before: Row | None
) -> DefinitionChange | None:
    spec = to_spec(definition)
    action: Action = "add"
    if before is not None:
        if before["template_id"] is not None and before["closed_at"] is None:
            raise DefinitionError(
                f"{entry}, name: a template makes a definition of this name",
                entry=entry,
                field="name",
                fix="choose another name, or take the org out of the template's selector",
            )
        if before["closed_at"] is not None:
            action = "reopen"
        elif differing(before["spec"], spec) or before["enabled"] != definition.enabled:
            action = "change"
        else:
            return None
    return DefinitionChange(action, org_id, definition.org, definition.name, before, spec, definition.enabled)


def _closed(rows: Iterable[Row]) -> list[DefinitionChange]:
    return [
        DefinitionChange("close", row["org_id"], row["org"], row["name"], row, row["spec"], row["enabled"])
        for row in rows
        if row["closed_at"] is None and row["template_id"] is None
    ]
