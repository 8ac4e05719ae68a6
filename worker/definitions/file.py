"""A file for `apply`, TOML or the same as JSON: orgs, definitions and templates, all of it checked."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from worker.definitions import fields
from worker.definitions.definition import Definition, parse_definition
from worker.definitions.fields import Fields, refusal
from worker.definitions.templates import TemplateEntry, parse_template
from worker.definitions.units import MAX_DEPTH
from worker.definitions.zones import parse_zone
from worker.errors import DefinitionError, InvalidTrigger
from worker.orgs import MAX_CONCURRENT_RUNS, WEIGHT, OrgEntry

Format = Literal["toml", "json"]
T = TypeVar("T")

_NESTED = f"let tables and lists nest at most {MAX_DEPTH} levels; nothing was changed"

_KINDS = ("org", "definition", "template")
_ORG_KEYS = ("code", "name", "issuer", "max_concurrent_runs", "weight", "tags", "timezone")


@dataclass(frozen=True, slots=True)
class DefinitionsFile:
    """What a file says, in its order."""

    orgs: tuple[OrgEntry, ...] = ()
    definitions: tuple[Definition, ...] = ()
    templates: tuple[TemplateEntry, ...] = ()


def format_of(path: str) -> Format:
    """The format that a file's name promises: JSON for `.json`, else TOML."""
    return "json" if PurePath(path).suffix.lower() == ".json" else "toml"


def parse_file(content: str | bytes, format: Format = "toml") -> DefinitionsFile:
    """The orgs, definitions and templates of a file.

    Raises:
        DefinitionError: the first thing that is wrong, by entry and field.
    """
    values = _load(content, format)
    for key in values:
        if key not in _KINDS:
            raise DefinitionError(
                f"unknown key {key!r}", field=key, fix="a file has [[org]], [[definition]] and [[template]]"
            )
    orgs = _entries(values, "org", ("code",), lambda item, entry: parse_org(item, entry=entry))
    definitions = _entries(
        values, "definition", ("org", "name"), lambda item, entry: parse_definition(item, entry=entry)
    )
    templates = _entries(values, "template", ("name",), lambda item, entry: parse_template(item, entry=entry))
    _each_once((f"org {org.code}" for org in orgs), "code")
    _each_once((entry_of(definition) for definition in definitions), "name")
    _each_once((f"template {template.name}" for template in templates), "name")
    return DefinitionsFile(orgs, definitions, templates)


def entry_of(definition: Definition) -> str:
    """How errors name a definition's entry in a file."""
    return f"definition {definition.org}/{definition.name}"


def parse_org(values: Any, *, entry: str) -> OrgEntry:
    """The org that an entry of a file describes.

    Raises:
        DefinitionError: names entry and field of what is wrong.
    """
    reader = Fields(values, entry)
    reader.only(_ORG_KEYS)
    code = reader.take("code", fields.name)
    timezone = reader.take("timezone", fields.text, None)
    no_tags: tuple[str, ...] = ()
    if timezone is not None:
        try:
            parse_zone(timezone)
        except InvalidTrigger as error:
            raise refusal(error.message, entry, "timezone", fix=error.fix) from error
    return OrgEntry(
        code=code,
        name=reader.take("name", fields.text, code),
        issuer=reader.take("issuer", fields.text),
        max_concurrent_runs=reader.take("max_concurrent_runs", fields.integer(1), MAX_CONCURRENT_RUNS),
        weight=reader.take("weight", fields.integer(1), WEIGHT),
        tags=frozenset(reader.take("tags", fields.texts, no_tags)),
        timezone=timezone,
    )


def _load(content: str | bytes, format: Format) -> Mapping[str, Any]:
    try:
        text = content.decode() if isinstance(content, bytes) else content
        values = json.loads(text, object_pairs_hook=_unique) if format == "json" else tomllib.loads(text)
    except RecursionError:
        raise DefinitionError("the file nests too deeply to be read", fix=_NESTED) from None
    except ValueError as error:
        # The parsers' errors are ValueErrors too, and name line and column.
        raise DefinitionError(
            f"the file is no {format.upper()}: {error}", fix="correct it there; nothing was changed"
        ) from error
    if not isinstance(values, dict):
        raise DefinitionError(
            "the file is no table of org, definition and template",
            fix='as JSON it is one object: {"definition": [...]}',
        )
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _entries(
    values: Mapping[str, Any], kind: str, names: tuple[str, ...], parse: Callable[[Any, str], T]
) -> tuple[T, ...]:
    items = values.get(kind, [])
    if not isinstance(items, list):
        raise DefinitionError(f"{kind} is no list", field=kind, fix=f"write each as [[{kind}]]")
    return tuple(parse(item, _entry(item, kind, names, place)) for place, item in enumerate(items, start=1))


def _entry(item: Any, kind: str, names: tuple[str, ...], place: int) -> str:
    """The entry by its name, else by its place among those of its kind."""
    parts = [item.get(name) for name in names] if isinstance(item, Mapping) else []
    named = [part for part in parts if isinstance(part, str) and part]
    return f"{kind} {'/'.join(named)}" if len(named) == len(names) else f"{kind} number {place}"


def _each_once(entries: Iterable[str], field: str) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry in seen:
            raise refusal("stands twice in the file", entry, field, fix="remove one, or rename it")
        seen.add(entry)
