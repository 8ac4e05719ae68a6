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
        raise DefinitionError(f"{value!r} selects no orgs", entry=entry, field=field, fix=_FIX)
    for key in value:
        if key not in ("tags", "issuer"):
            raise DefinitionError(f"unknown key {key!r}", entry=entry, field=f"{field}.{key}", fix=_FIX)
    tags = value.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise DefinitionError("tags are a list of texts", entry=entry, field=f"{field}.tags", fix=_FIX)
    if "tags" in value and not tags:
        raise DefinitionError("an empty list of tags", entry=entry, field=f"{field}.tags", fix=_FIX)
    issuer = value.get("issuer")
    if "issuer" in value and not (isinstance(issuer, str) and issuer):
        raise DefinitionError("an issuer is a text", entry=entry, field=f"{field}.issuer", fix=_FIX)
    return Selector(tags=frozenset(tags), issuer=issuer)
