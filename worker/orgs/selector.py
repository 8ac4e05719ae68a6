"""Selector: which orgs a template means: all, those with certain tags, those of an issuer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.errors import DefinitionError

_FIX = 'write orgs = "all", orgs = { tags = ["pro"] } or orgs = { issuer = "main" }'


@dataclass(frozen=True, slots=True)
class Selector:
    """An org matches when it has every tag of `tags` and, where `issuer` is given, belongs to that issuer.

    With neither, every org matches.
    """

    tags: frozenset[str] = frozenset()
    issuer: str | None = None

    def matches(self, *, tags: Iterable[str], issuer: str) -> bool:
        """Whether an org with these tags and this issuer is meant."""
        return (self.issuer is None or self.issuer == issuer) and self.tags <= set(tags)

    def as_json(self) -> Any:
        """The canonical form for the database; `parse_selector` reads it back."""
        chosen: dict[str, Any] = {}
        if self.tags:
            chosen["tags"] = sorted(self.tags)
        if self.issuer is not None:
            chosen["issuer"] = self.issuer
        return chosen or "all"


def parse_selector(value: Any, *, entry: str = "", field: str = "orgs") -> Selector:
    """The selector that `orgs` of a template names.

    Raises:
        DefinitionError: it is neither `"all"` nor a table of `tags` and `issuer`.
    """
    if value == "all":
        return Selector()
    if not isinstance(value, Mapping) or not value:
        raise _refusal(f"{value!r} selects no orgs", entry, field)
    for key in value:
        if key not in ("tags", "issuer"):
            raise _refusal(f"unknown key {key!r}", entry, f"{field}.{key}")
    tags = value.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise _refusal("tags are a list of texts", entry, f"{field}.tags")
    if "tags" in value and not tags:
        raise _refusal("an empty list of tags", entry, f"{field}.tags")
    issuer = value.get("issuer")
    if "issuer" in value and not (isinstance(issuer, str) and issuer):
        raise _refusal("an issuer is a text", entry, f"{field}.issuer")
    return Selector(tags=frozenset(tags), issuer=issuer)


def _refusal(problem: str, entry: str, field: str) -> DefinitionError:
    place = f"{entry}, {field}" if entry else field
    return DefinitionError(f"{place}: {problem}", entry=entry, field=field, fix=_FIX)
