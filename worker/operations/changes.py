"""What an `apply` changes: one line per org, definition and template, and the template rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection

from worker.definitions.templates import TemplateEntry
from worker.errors import DefinitionError
from worker.ids import TemplateId, new_id
from worker.operations.handlers import Handlers
from worker.store import audit, templates

Kind = Literal["org", "definition", "template"]
Action = Literal["add", "change", "reopen", "close"]


@dataclass(frozen=True, slots=True)
class Change:
    """One change: `fields` has the value before and after of each key; an absent one is None."""

    kind: Kind
    action: Action
    org: str | None
    name: str
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """The columns that `apply` prints."""
        fields = {key: {"before": before, "after": after} for key, (before, after) in self.fields.items()}
        return {
            "kind": self.kind,
            "action": self.action,
            "org": self.org,
            "name": self.name,
            "fields": fields,
        }


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values are not the same, with both."""
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if not same(before.get(key), after.get(key))
    }


def same(one: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1, while 1 and 1.0 are one number, as in `jsonb`."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateChange:
    """A template to add (`before` None), change, reopen or close, and what it is to be."""

    action: Action
    id: TemplateId
    name: str
    before: Row | None
    selector: Any
    spec: Mapping[str, Any]

    @property
    def revision(self) -> int:
        """The revision that it has afterwards; closing a template makes none."""
        if self.before is None:
            return 1
        return int(self.before["revision"]) + (self.action != "close")

    def shown(self) -> Change:
        if self.action == "close":
            return Change("template", "close", None, self.name)
        before = {} if self.before is None else {**self.before["spec"], "orgs": self.before["selector"]}
        return Change(
            "template", self.action, None, self.name, differing(before, {**self.spec, "orgs": self.selector})
        )


def plan_template(
    connection: Connection,
    entry: TemplateEntry,
    handlers: Handlers,
    *,
    inline: Collection[str],
    allow_unknown: bool,
    issuers: Collection[str] | None,
) -> TemplateChange | None:
    """Check one template of a file and compare it with the stored one; None where nothing changes.

    Raises:
        DefinitionError: names the field that cannot be accepted.
    """
    named = f"template {entry.name}"
    handlers.check(entry.definition, named, inline=inline, allow_unknown=allow_unknown)
    issuer = entry.selector.issuer
    if issuers is not None and issuer is not None and issuer not in issuers:
        raise DefinitionError(
            f"{named}, orgs.issuer: there is no issuer {issuer!r}; worker.toml has "
            f"{', '.join(sorted(issuers)) or 'none'}",
            entry=named,
            field="orgs.issuer",
            fix=f"add a table [issuers.{issuer}] to worker.toml, or correct the name",
        )
    before = templates.find(connection, entry.name)
    selector, spec = entry.selector.as_json(), entry.spec
    if before is None:
        return TemplateChange("add", TemplateId(new_id()), entry.name, None, selector, spec)
    if before["closed_at"] is not None:
        return TemplateChange("reopen", before["id"], entry.name, before, selector, spec)
    if differing({**before["spec"], "orgs": before["selector"]}, {**spec, "orgs": selector}):
        return TemplateChange("change", before["id"], entry.name, before, selector, spec)
    return None


def write_templates(
    connection: Connection, changes: Sequence[TemplateChange], *, actor: str, at: datetime
) -> None:
    """Write planned changes of templates; the definitions follow, org by org."""
    for change in changes:
        values = {
            "name": change.name,
            "revision": change.revision,
            "selector": change.selector,
            "spec": dict(change.spec),
            "updated_at": at,
            "updated_by": actor,
            "closed_at": at if change.action == "close" else None,
        }
        if change.before is None:
            values["created_at"] = at
        templates.write(connection, change.id, values, new=change.before is None)


def template_audit_entry(change: TemplateChange) -> audit.Entry:
    """What the audit says of the change itself; each definition that follows has its own row."""
    shown = change.shown()
    detail = {key: {"before": before, "after": after} for key, (before, after) in shown.fields.items()}
    return audit.Entry(None, f"template.{change.action}", change.name, detail)
