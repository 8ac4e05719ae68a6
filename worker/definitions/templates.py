"""Template: one definition for every org that a selector means -> the definitions it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from worker.definitions.definition import Definition, from_spec, parse_definition, to_spec
from worker.definitions.fields import Fields, name, refusal
from worker.orgs import Selector, parse_selector

# Stands for the org while there is none.
ANY_ORG = "*"


@dataclass(frozen=True, slots=True)
class TemplateEntry:
    """A template as a file has it; `definition` is complete but for its org."""

    name: str
    selector: Selector
    definition: Definition

    def definition_for(self, org_code: str) -> Definition:
        """The definition of the same name that an org inherits."""
        return replace(self.definition, org=org_code)

    @property
    def spec(self) -> dict[str, Any]:
        """The canonical spec of its definitions; `enabled` stands in it where it is false."""
        return to_spec(self.definition) | ({} if self.definition.enabled else {"enabled": False})


def parse_template(values: Any, *, entry: str) -> TemplateEntry:
    """The template that an entry of a file describes: the keys of a definition, `orgs` in place of `org`.

    Raises:
        DefinitionError: names entry and field of what is wrong.
    """
    reader = Fields(values, entry)
    if "org" in values:
        raise refusal("a template has no org", entry, "org", fix="write orgs, or make it a [[definition]]")
    selector = parse_selector(reader.take("orgs", lambda value: value), entry=entry)
    rest = {key: value for key, value in values.items() if key != "orgs"}
    return TemplateEntry(
        name=reader.take("name", name),
        selector=selector,
        definition=parse_definition(rest | {"org": ANY_ORG}, entry=entry),
    )


def from_template_spec(template_name: str, selector: Any, spec: Mapping[str, Any]) -> TemplateEntry:
    """The template that a row of `templates` holds.

    Raises:
        DefinitionError: this version does not understand it.
    """
    rest = {key: value for key, value in spec.items() if key != "enabled"}
    definition = from_spec(ANY_ORG, template_name, rest, enabled=spec.get("enabled", True))
    return TemplateEntry(
        template_name, parse_selector(selector, entry=f"template {template_name}"), definition
    )
