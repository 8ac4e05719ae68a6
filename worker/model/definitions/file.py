"""A file for `apply`, TOML or JSON: orgs, definitions, templates, calendars, budgets, limits, rollouts."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from worker.errors import DefinitionError
from worker.model.definitions import fields
from worker.model.definitions.budgets import BudgetEntry, parse_budget
from worker.model.definitions.calendars import CalendarEntry, ReadFile, no_files, parse_calendar
from worker.model.definitions.definition import Definition, from_spec, parse_definition, to_spec
from worker.model.definitions.fields import Faults, Fields, refusal
from worker.model.definitions.limits import LimitEntry, parse_limit
from worker.model.definitions.pools import parse_pool
from worker.model.definitions.rollouts import RolloutEntry, parse_rollout
from worker.model.definitions.units import MAX_DEPTH
from worker.model.definitions.zones import zone_name
from worker.model.orgs import MAX_CONCURRENT_RUNS, WEIGHT, OrgEntry, Selector, parse_selector

Format = Literal["toml", "json"]
T = TypeVar("T")

# Replaces the org in the definition of a template.
ANY_ORG = "*"
# Valid values for required keys, so that the others are checked too if one is missing or invalid.
_STAND_INS = dict.fromkeys(("code", "issuer", "org", "name", "handler"), "x") | {
    "schedule": "@hourly",
    "orgs": "all",
}
_KINDS = ("org", "definition", "template", "calendar", "budget", "limit", "rollout")
_ORG_KEYS = ("code", "name", "issuer", "max_concurrent_runs", "weight", "tags", "timezone", "pool")


@dataclass(frozen=True, slots=True)
class TemplateEntry:
    """A template: one definition, complete except for its org, for each org that the selector matches."""

    name: str
    selector: Selector
    definition: Definition

    @property
    def spec(self) -> dict[str, Any]:
        """The canonical spec of its definitions; includes `enabled` if it is false."""
        return to_spec(self.definition) | ({} if self.definition.enabled else {"enabled": False})


@dataclass(frozen=True, slots=True)
class DefinitionsFile:
    """The entries of a file, in its order."""

    orgs: tuple[OrgEntry, ...] = ()
    definitions: tuple[Definition, ...] = ()
    templates: tuple[TemplateEntry, ...] = ()
    budgets: tuple[BudgetEntry, ...] = ()
    calendars: tuple[CalendarEntry, ...] = ()
    limits: tuple[LimitEntry, ...] = ()
    rollouts: tuple[RolloutEntry, ...] = ()


def format_of(path: str) -> Format:
    """The format of a file by its name: JSON for `.json`, else TOML."""
    return "json" if PurePath(path).suffix.lower() == ".json" else "toml"


def parse_file(
    content: str | bytes, format: Format = "toml", *, read_file: ReadFile = no_files
) -> DefinitionsFile:
    """The entries of a file. `read_file` reads the iCalendar files that calendars name.

    Raises DefinitionError: the first error, with the `others` of the file.
    """
    values, faults = _load(content, format), Faults()
    for key in values:
        if key not in _KINDS:
            faults.add(
                DefinitionError(
                    f"unknown key {key!r}",
                    field=key,
                    fix=f"write {', '.join(f'[[{kind}]]' for kind in _KINDS[:-1])} or [[{_KINDS[-1]}]]",
                )
            )
    read_calendar = partial(parse_calendar, read_file=read_file)
    file = DefinitionsFile(
        _entries(values, "org", ("code",), parse_org, faults),
        _entries(values, "definition", ("org", "name"), parse_definition, faults),
        _entries(values, "template", ("name",), parse_template, faults),
        _budgets(values, faults),
        _entries(values, "calendar", ("name",), read_calendar, faults, each_key=False),
        _limits(values, faults),
        _entries(values, "rollout", ("name",), parse_rollout, faults, each_key=False),
    )
    faults.check()
    return file


def parse_org(values: Any, entry: str) -> OrgEntry:
    """The org of an entry of a file; raises DefinitionError."""
    reader = Fields(values, entry)
    reader.only(_ORG_KEYS)
    code = reader.take("code", fields.name)
    timezone = reader.take("timezone", zone_name, None)
    no_tags: tuple[str, ...] = ()
    return OrgEntry(
        code=code,
        name=reader.take("name", fields.text, code),
        issuer=reader.take("issuer", fields.text),
        max_concurrent_runs=reader.take("max_concurrent_runs", fields.integer(1), MAX_CONCURRENT_RUNS),
        weight=reader.take("weight", fields.integer(1), WEIGHT),
        tags=frozenset(reader.take("tags", fields.texts, no_tags)),
        timezone=timezone,
        pool=reader.take("pool", parse_pool, None),
    )


def parse_template(values: Any, entry: str) -> TemplateEntry:
    """The template of an entry of a file, which has `orgs` instead of `org`; raises DefinitionError."""
    reader = Fields(values, entry)
    if "org" in values:
        raise refusal("a template has no org", entry, "org", fix="write orgs, or make it a [[definition]]")
    selector = parse_selector(reader.take("orgs", lambda value: value), entry=entry)
    name = reader.take("name", fields.name)
    rest = {key: value for key, value in values.items() if key != "orgs"}
    return TemplateEntry(name, selector, parse_definition(rest | {"org": ANY_ORG}, entry))


def from_template_spec(template_name: str, selector: Any, spec: Mapping[str, Any]) -> TemplateEntry:
    """The template of a row of `templates`; raises DefinitionError if this version cannot read it."""
    rest = {key: value for key, value in spec.items() if key != "enabled"}
    definition = from_spec(ANY_ORG, template_name, rest, enabled=spec.get("enabled", True))
    return TemplateEntry(
        template_name, parse_selector(selector, entry=f"template {template_name}"), definition
    )


def _load(content: str | bytes, format: Format) -> Mapping[str, Any]:
    try:
        text = content.decode() if isinstance(content, bytes) else content
        values = json.loads(text, object_pairs_hook=_unique) if format == "json" else tomllib.loads(text)
    except RecursionError:
        raise DefinitionError(
            "the file nests too deeply to be read",
            fix=f"let tables and lists nest at most {MAX_DEPTH} levels; nothing was changed",
        ) from None
    except ValueError as error:
        # The parsers' errors are ValueErrors too, with line and column.
        raise DefinitionError(
            f"the file is not valid {format.upper()}: {error}", fix="correct it there; nothing was changed"
        ) from error
    if not isinstance(values, dict):
        raise DefinitionError(
            f"the file is not valid: expected a table of {', '.join(_KINDS)}",
            fix='as JSON it is one object: {"definition": [...]}',
        )
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {twice!r} in one object")
    return found


def _entries(
    values: Mapping[str, Any],
    kind: str,
    names: tuple[str, ...],
    parse: Callable[[Any, str], T],
    faults: Faults,
    *,
    each_key: bool = True,
) -> tuple[T, ...]:
    """The parsed entries of one kind; each has other names than those before it.

    With `each_key` the other keys of an entry are checked also if one is invalid.
    """
    items = _items(values, kind, faults)
    found: list[T] = []
    seen: set[str] = set()
    for number, item in enumerate(items, start=1):
        parts: list[Any] = [item.get(name) for name in names] if isinstance(item, Mapping) else []
        known = len(parts) == len(names) and all(isinstance(part, str) and part for part in parts)
        entry = f"{kind} {'/'.join(parts)}" if known else f"{kind} number {number}"
        parsed = _parsed(item, entry, parse, faults, each_key=each_key)
        if parsed is not None:
            found.append(parsed)
        if known:
            # Names are parsed without spaces around them.
            identity = "/".join(part.strip() for part in parts)
            if identity in seen:
                faults.add(
                    refusal("appears twice in the file", entry, names[-1], fix="remove one, or rename it")
                )
            seen.add(identity)
    return tuple(found)


def _parsed(
    item: Any, entry: str, parse: Callable[[Any, str], T], faults: Faults, *, each_key: bool
) -> T | None:
    """An entry; None if it is invalid. With `each_key` it is parsed again without what is wrong."""
    wrong: set[str] = set()
    while True:
        try:
            parsed = parse(item, entry)
        except DefinitionError as error:
            if error.field in wrong:
                return None
            faults.add(error)
            if not each_key or not (error.field in item or error.field in _STAND_INS):
                return None
            wrong.add(error.field)
            rest = {key: value for key, value in item.items() if key != error.field}
            item = rest | {key: value for key, value in _STAND_INS.items() if key == error.field}
        else:
            return None if wrong else parsed


def _items(values: Mapping[str, Any], kind: str, faults: Faults) -> list[Any]:
    items = values.get(kind, [])
    if not isinstance(items, list):
        faults.add(DefinitionError(f"{kind} is not a list", field=kind, fix=f"write each as [[{kind}]]"))
        return []
    return items


def _budgets(values: Mapping[str, Any], faults: Faults) -> tuple[BudgetEntry, ...]:
    """The parsed budgets; the same orgs have one of each meter and period."""
    found: dict[tuple[str, str, str], BudgetEntry] = {}
    for number, item in enumerate(_items(values, "budget", faults), start=1):
        meter = item.get("meter") if isinstance(item, Mapping) else None
        entry = f"budget number {number}" + (f" ({meter})" if isinstance(meter, str) else "")
        with faults.collecting():
            budget = parse_budget(item, entry)
            identity = (budget.target, budget.meter, budget.per)
            if identity in found:
                problem = "the same orgs, meter and period appear twice in the file"
                raise refusal(problem, entry, "per", fix="remove one: of several limits, the lowest counts")
            found[identity] = budget
    return tuple(found.values())


def _limits(values: Mapping[str, Any], faults: Faults) -> tuple[LimitEntry, ...]:
    """The parsed limits; an origin has one of each `per`."""
    found: dict[tuple[str, str], LimitEntry] = {}
    for number, item in enumerate(_items(values, "limit", faults), start=1):
        origin = item.get("origin") if isinstance(item, Mapping) else None
        entry = f"limit number {number}" + (f" ({origin})" if isinstance(origin, str) else "")
        with faults.collecting():
            limit = parse_limit(item, entry)
            identity = (limit.origin, limit.per)
            if identity in found:
                raise refusal(
                    "the same origin and per appear twice in the file", entry, "per", fix="remove one"
                )
            found[identity] = limit
    return tuple(found.values())
