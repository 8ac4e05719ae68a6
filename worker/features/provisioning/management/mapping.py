"""Which tags an org has by what its provider says of it: `[issuers.NAME.management.tags]`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.features.provisioning.management.contract import PropertyValue, ProviderOrg

_RULE = re.compile(r"(external_id|handle|is_default|properties\.([^\s=]{1,200}))(?:=(.{1,1000}))?")


@dataclass(frozen=True, slots=True)
class TagRule:
    """An org has the tag if `field` has this value, or any value if `value` is None.

    `field` is external_id, handle, is_default or a property's key if `is_property`. True has the
    value `true`. An empty text and false count as missing.
    """

    tag: str
    field: str
    is_property: bool
    value: str | None = None

    def matches(self, org: ProviderOrg, properties: Mapping[str, PropertyValue]) -> bool:
        found = properties.get(self.field) if self.is_property else getattr(org, self.field)
        if self.value is None:
            return found not in (None, "", False)
        text = str(found).lower() if isinstance(found, bool) else found
        return text == self.value


def parse_rule(tag: str, text: str) -> TagRule:
    """The rule of one tag; raises ValueError with the form that it must have."""
    found = _RULE.fullmatch(text)
    if found is None or not tag.strip():
        raise ValueError(
            f'tag {tag!r}: write FIELD or FIELD=VALUE, such as pro = "properties.plan=pro"; FIELD is '
            "external_id, handle, is_default or properties.KEY"
        )
    return TagRule(tag, found[2] or found[1], found[2] is not None, found[3])


def parse_rules(tags: Mapping[str, str]) -> tuple[TagRule, ...]:
    return tuple(parse_rule(tag, text) for tag, text in tags.items())


def need_properties(rules: Iterable[TagRule]) -> bool:
    """Whether any rule needs the org's properties, which cost a request for each org."""
    return any(rule.is_property for rule in rules)


def mapped_tags(
    org: ProviderOrg, properties: Mapping[str, PropertyValue], rules: Iterable[TagRule], tags: frozenset[str]
) -> frozenset[str]:
    """The org's tags after the mapping: `tags` with those of the rules added or removed, no others."""
    rules = tuple(rules)
    matching = {rule.tag for rule in rules if rule.matches(org, properties)}
    return (tags - {rule.tag for rule in rules}) | matching
