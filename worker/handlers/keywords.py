"""The keywords of JSON Schema (draft 2020-12) that hold a value against a rule, and how a refusal reads.

Each judges one value and hands what lies further in back to the check that called it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

Verdict = bool | None
"""Whether a value fits; None where it cannot be told."""

_SHOWN = 60


class Judge(Protocol):
    """What a keyword needs of the check it belongs to. Each method counts its steps."""

    def spend(self, steps: int) -> None: ...

    def fits(self, schema: Any, value: Any) -> Verdict: ...

    def matches(self, pattern: str, text: str) -> bool: ...

    def is_among(self, options: Any, value: Any) -> Verdict: ...

    def target(self, reference: Any) -> Any: ...


Keyword = Callable[[Judge, Any, Mapping[str, Any], Any], Verdict]
"""A rule: the check, the keyword's own value, the subschema it stands in, and the value to judge."""


def _all(verdicts: Iterator[Verdict]) -> Verdict:
    found: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            found = None
    return found


def _not(verdict: Verdict) -> Verdict:
    return None if verdict is None else not verdict


def _any(verdicts: Iterator[Verdict]) -> Verdict:
    return _not(_all(_not(verdict) for verdict in verdicts))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": _is_integer,
}


def _type(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if isinstance(wanted, str):
        return _TYPES[wanted](value)
    check.spend(len(wanted))
    return any([_TYPES[kind](value) for kind in wanted])


def _bound(applies: Callable[[Any], bool], holds: Callable[[Any, Any], bool]) -> Keyword:
    """A keyword that compares a number, or the size of a value, with a number."""

    def rule(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
        if not _is_number(wanted):
            return None
        return not applies(value) or holds(value, wanted)

    return rule


def _multiple(value: Any, of: Any) -> bool:
    if isinstance(value, int) and isinstance(of, int):
        return value % of == 0
    # As pydantic tolerates what a float cannot hold: 0.3 is a multiple of 0.1.
    rest, tolerance = abs(float(value) % float(of)), abs(float(value)) / 1e9
    return rest <= tolerance or abs(rest - of) <= tolerance


def _required(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(wanted, list):
        return None
    check.spend(len(wanted))
    return not isinstance(value, Mapping) or all(name in value for name in wanted)


def _dependent_required(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(wanted))
    return _all(_required(check, names, schema, value) for name, names in wanted.items() if name in value)


def _pattern(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    return not isinstance(value, str) or check.matches(wanted, value)


def _unique(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, list) or wanted is not True:
        return True
    return len({canonical(item, check.spend) for item in value}) == len(value)


def _member_rule(name: str) -> Keyword:
    def rule(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
        if not isinstance(value, Mapping):
            return True
        return _all(check.fits(inner, what) for _, inner, what in members(check, name, schema, value))

    return rule


def first_item(name: str, schema: Mapping[str, Any]) -> int:
    """The place in an array of the first item that the keyword is about."""
    return len(schema.get("prefixItems", ())) if name == "items" else 0


def items_of(name: str, schema: Mapping[str, Any], value: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    if name == "items":
        return ((schema[name], item) for item in value[first_item(name, schema) :])
    return zip(schema[name], value, strict=False)


def _item_rule(name: str) -> Keyword:
    def rule(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
        if not isinstance(value, list):
            return True
        check.spend(len(value))
        return _all(check.fits(inner, item) for inner, item in items_of(name, schema, value))

    return rule


def _contains(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, list):
        return True
    check.spend(len(value))
    least, most = schema.get("minContains", 1), schema.get("maxContains", len(value))
    verdicts = [check.fits(wanted, item) for item in value]
    certain, possible = verdicts.count(True), len(verdicts) - verdicts.count(False)
    if certain > most or possible < least:
        return False
    return True if certain >= least and possible <= most else None


def _one_of(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    verdicts = [check.fits(branch, value) for branch in wanted]
    certain = verdicts.count(True)
    if certain > 1:
        return False
    return None if None in verdicts else certain == 1


def _if(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    met = check.fits(wanted, value)
    if met is None:
        return None
    return check.fits(schema.get("then" if met else "else", True), value)


def _dependent_schemas(check: Judge, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(wanted))
    return _all(check.fits(inner, value) for name, inner in wanted.items() if name in value)


def members(
    judge: Judge, name: str, schema: Mapping[str, Any], value: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Key, subschema, and the value that a keyword about members holds against it."""
    judge.spend(len(value))
    wanted = schema[name]
    if name == "propertyNames":
        yield from ((key, wanted, key) for key in value)
    elif name == "properties":
        yield from ((key, wanted[key], item) for key, item in value.items() if key in wanted)
    elif name == "patternProperties":
        for pattern, inner in wanted.items():
            for key, item in value.items():
                if judge.matches(pattern, key):
                    yield key, inner, item
    else:
        known = schema.get("properties", {})
        patterns = schema.get("patternProperties", {})
        for key, item in value.items():
            if key not in known and not any(judge.matches(pattern, key) for pattern in patterns):
                yield key, wanted, item


_is_text, _is_list, _is_object = _TYPES["string"], _TYPES["array"], _TYPES["object"]

RULES: Mapping[str, Keyword] = {
    "type": _type,
    "enum": lambda check, wanted, schema, value: check.is_among(wanted, value),
    "const": lambda check, wanted, schema, value: (
        canonical(wanted, check.spend) == canonical(value, check.spend)
    ),
    "minimum": _bound(_is_number, lambda value, wanted: value >= wanted),
    "maximum": _bound(_is_number, lambda value, wanted: value <= wanted),
    "exclusiveMinimum": _bound(_is_number, lambda value, wanted: value > wanted),
    "exclusiveMaximum": _bound(_is_number, lambda value, wanted: value < wanted),
    "multipleOf": _bound(_is_number, _multiple),
    "minLength": _bound(_is_text, lambda value, wanted: len(value) >= wanted),
    "maxLength": _bound(_is_text, lambda value, wanted: len(value) <= wanted),
    "minItems": _bound(_is_list, lambda value, wanted: len(value) >= wanted),
    "maxItems": _bound(_is_list, lambda value, wanted: len(value) <= wanted),
    "minProperties": _bound(_is_object, lambda value, wanted: len(value) >= wanted),
    "maxProperties": _bound(_is_object, lambda value, wanted: len(value) <= wanted),
    "pattern": _pattern,
    "uniqueItems": _unique,
    "required": _required,
    "dependentRequired": _dependent_required,
    "contains": _contains,
    "properties": _member_rule("properties"),
    "patternProperties": _member_rule("patternProperties"),
    "additionalProperties": _member_rule("additionalProperties"),
    "propertyNames": _member_rule("propertyNames"),
    "prefixItems": _item_rule("prefixItems"),
    "items": _item_rule("items"),
    "dependentSchemas": _dependent_schemas,
    "$ref": lambda check, wanted, schema, value: check.fits(check.target(wanted), value),
    "allOf": lambda check, wanted, schema, value: _all(check.fits(inner, value) for inner in wanted),
    "anyOf": lambda check, wanted, schema, value: _any(check.fits(inner, value) for inner in wanted),
    "oneOf": _one_of,
    "not": lambda check, wanted, schema, value: _not(check.fits(wanted, value)),
    "if": _if,
}

# Reasons that lie further in, told where nothing nearer is wrong.
INNER = (
    *("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "properties", "patternProperties"),
    *("propertyNames", "prefixItems", "items", "contains"),
)

WORDS: Mapping[str, Callable[[Any, Any], str]] = {
    "type": lambda wanted, value: f"{shown(value)} is not of type {kinds(wanted)}",
    "enum": lambda wanted, value: f"{shown(value)} is not one of {shown(wanted)}",
    "const": lambda wanted, value: f"{shown(value)} is not {shown(wanted)}",
    "minimum": lambda wanted, value: f"{shown(value)} is less than the minimum of {wanted}",
    "maximum": lambda wanted, value: f"{shown(value)} is greater than the maximum of {wanted}",
    "exclusiveMinimum": lambda wanted, value: f"{shown(value)} is not greater than {wanted}",
    "exclusiveMaximum": lambda wanted, value: f"{shown(value)} is not less than {wanted}",
    "multipleOf": lambda wanted, value: f"{shown(value)} is not a multiple of {wanted}",
    "minLength": lambda wanted, value: f"{shown(value)} is shorter than {wanted} characters",
    "maxLength": lambda wanted, value: f"{shown(value)} is longer than {wanted} characters",
    "minItems": lambda wanted, value: f"{shown(value)} has fewer than {wanted} items",
    "maxItems": lambda wanted, value: f"{shown(value)} has more than {wanted} items",
    "minProperties": lambda wanted, value: f"{shown(value)} has fewer than {wanted} members",
    "maxProperties": lambda wanted, value: f"{shown(value)} has more than {wanted} members",
    "pattern": lambda wanted, value: f"{shown(value)} does not match {shown(wanted)}",
    "uniqueItems": lambda wanted, value: f"{shown(value)} has items that are equal",
}


def kinds(wanted: Any) -> str:
    return wanted if isinstance(wanted, str) else " or ".join(wanted)


def shown(value: Any) -> str:
    """A value, short: its beginning only, and of a container no more than that needs."""
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    elif isinstance(value, list):
        value = value[:_SHOWN]
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def canonical(value: Any, spend: Callable[[int], None]) -> str:
    """Equal for values that JSON Schema holds equal: 1 and 1.0 are, 1 and true are not.

    A text, since its hash is secret: numbers can be chosen so that all fall into one bucket.
    """
    spend(1)
    if value is None or isinstance(value, bool | str):
        text = json.dumps(value)
    elif isinstance(value, int | float):
        text = str(int(value)) if _is_integer(value) else repr(value)
    elif isinstance(value, list):
        text = f"[{','.join([canonical(item, spend) for item in value])}]"
    else:
        members = sorted(f"{json.dumps(key)}:{canonical(item, spend)}" for key, item in value.items())
        text = f"{{{','.join(members)}}}"
    spend(len(text) // 100)
    return text
