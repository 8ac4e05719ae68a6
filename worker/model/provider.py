"""What a provider and orgworker say to each other: names of applications, and tags by properties. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

_NAME = re.compile(r"orgworker ([0-9a-z]{4,32}) ([0-9a-f-]{4,40}) (\S.{0,199})")
_RULE = re.compile(r"(external_id|handle|is_default|properties\.([^\s=]{1,200}))(?:=(.{1,1000}))?")


@dataclass(frozen=True, slots=True)
class ApplicationName:
    """The name of an application that orgworker makes: a provider may tell nothing else about its org.

    `installation` is the key of this installation, 4 to 32 letters a-z and digits. `key` is that of the
    row that was written before the application was made, 4 to 40 hexadecimal digits and dashes: a rerun
    finds by it what it made.
    """

    installation: str
    key: str
    org: str

    def __post_init__(self) -> None:
        if self.parse(str(self)) != self:
            raise ValueError(f"not a name of an application: {self}")

    def __str__(self) -> str:
        return f"orgworker {self.installation} {self.key} {self.org}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The parts of a name, or None if orgworker did not give it."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        # Not by __init__, which calls this.
        name = object.__new__(cls)
        for attribute, value in zip(("installation", "key", "org"), found.groups(), strict=True):
            object.__setattr__(name, attribute, value)
        return name


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

    def matches(self, org: object, properties: Mapping[str, str | bool]) -> bool:
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
    org: object, properties: Mapping[str, str | bool], rules: Iterable[TagRule], tags: frozenset[str]
) -> frozenset[str]:
    """The org's tags after the mapping: `tags` with those of the rules added or removed, no others."""
    rules = tuple(rules)
    matching = {rule.tag for rule in rules if rule.matches(org, properties)}
    return (tags - {rule.tag for rule in rules}) | matching
