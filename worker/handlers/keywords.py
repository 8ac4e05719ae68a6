"""The keywords of JSON Schema (draft 2020-12): what each requires of a value.

A keyword returns a verdict, or the parts of the value that must fit further subschemas.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

Verdict = bool | None
"""Whether a value fits; None if that is undecided."""


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    found: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            found = None
    return found


def negated(verdict: Verdict) -> Verdict:
    return None if verdict is None else not verdict


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": _is_integer,
}


class Resolved(Protocol):
    """The whole schema: its references and enumerations."""

    def target(self, reference: Any) -> Any: ...

    def choices(self, wanted: Any, spend: Callable[[int], None]) -> Any: ...


class Checking(Protocol):
    """One check of one value, as keywords use it; `spend` counts steps."""

    @property
    def schema(self) -> Resolved: ...

    def spend(self, steps: int) -> None: ...

    def fits(self, schema: Any, value: Any) -> Verdict: ...

    def matches(self, pattern: str, text: str) -> bool: ...


# --- Keywords whose verdict is that of subschemas ----------------------------------------------

# A step down the path (None for the same value), the subschema, and the value that it applies to.
Part = tuple[str | None, Any, Any]
# What a keyword gets: the check, its own value, the subschema it is part of, and the value to check.
_PartsOf = Callable[["Checking", Any, Mapping[str, Any], Any], Iterable[Part]]


def _pattern_properties(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Iterator[Part]:
    for pattern, inner in wanted.items():
        for key, item in value.items():
            if check.matches(pattern, key):
                yield key, inner, item


def _additional_properties(
    check: Checking, wanted: Any, schema: Mapping[str, Any], value: Any
) -> Iterator[Part]:
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, item in value.items():
        if key not in known and not any(check.matches(pattern, key) for pattern in patterns):
            yield key, wanted, item


def _items(check: Checking, wanted: Any, schema: Mapping[str, Any], value: Any) -> Iterator[Part]:
    first = len(schema.get("prefixItems", ()))
    return ((str(place), wanted, item) for place, item in enumerate(value[first:], first))


def _dependent_schemas(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Iterator[Part]:
    check.spend(len(wanted))
    return ((None, inner, value) for name, inner in wanted.items() if name in value)


def _if(check: Checking, wanted: Any, schema: Mapping[str, Any], value: Any) -> Iterator[Part]:
    met = check.fits(wanted, value)
    if met is None:
        raise LookupError("the condition is undecided")
    yield None, schema.get("then" if met else "else", True), value


# The type of value that the keyword applies to (None: any), and its parts.
PARTS: Mapping[str, tuple[str | None, _PartsOf]] = {
    "properties": (
        "object",
        lambda check, wanted, schema, value: (
            (key, wanted[key], item) for key, item in value.items() if key in wanted
        ),
    ),
    "patternProperties": ("object", _pattern_properties),
    "additionalProperties": ("object", _additional_properties),
    "propertyNames": ("object", lambda check, wanted, schema, value: ((key, wanted, key) for key in value)),
    "dependentSchemas": ("object", _dependent_schemas),
    "prefixItems": (
        "array",
        lambda check, wanted, schema, value: (
            (str(place), *pair) for place, pair in enumerate(zip(wanted, value, strict=False))
        ),
    ),
    "items": ("array", _items),
    "$ref": (None, lambda check, wanted, schema, value: [(None, check.schema.target(wanted), value)]),
    "allOf": (None, lambda check, wanted, schema, value: ((None, inner, value) for inner in wanted)),
    "if": (None, _if),
}

# --- All other keywords ------------------------------------------------------------------------

_Rule = Callable[["Checking", Any, Mapping[str, Any], Any], Verdict]


def _type(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Verdict:
    if isinstance(wanted, str):
        return TYPES[wanted](value)
    check.spend(len(wanted))
    return any([TYPES[kind](value) for kind in wanted])


def _enum(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(wanted, list):
        return None
    return canonical(value, check.spend) in check.schema.choices(wanted, check.spend)


def _limit(kind: str, holds: Callable[[Any, Any], bool], size: Callable[[Any], Any] | None = None) -> _Rule:
    """A keyword that compares a number, or the size of a value, with a number."""

    def rule(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Verdict:
        if not _is_number(wanted):
            return None
        return not TYPES[kind](value) or holds(value if size is None else size(value), wanted)

    return rule


def _is_multiple(value: Any, of: Any) -> bool:
    if isinstance(value, int) and isinstance(of, int):
        return value % of == 0
    # With pydantic's tolerance for what a float cannot represent: 0.3 is a multiple of 0.1.
    rest, tolerance = abs(float(value) % float(of)), abs(float(value)) / 1e9
    return rest <= tolerance or abs(rest - of) <= tolerance


def _unique(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, list) or wanted is not True:
        return True
    return len({canonical(item, check.spend) for item in value}) == len(value)


def _required(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(wanted, list):
        return None
    check.spend(len(wanted))
    return not isinstance(value, Mapping) or all(name in value for name in wanted)


def _dependent_required(check: Checking, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(wanted))
    return all_of(_required(check, names, schema, value) for name, names in wanted.items() if name in value)


def _contains(check: Checking, wanted: Any, schema: Mapping[str, Any], value: Any) -> Verdict:
    if not isinstance(value, list):
        return True
    check.spend(len(value))
    least, most = schema.get("minContains", 1), schema.get("maxContains", len(value))
    verdicts = [check.fits(wanted, item) for item in value]
    certain, possible = verdicts.count(True), len(verdicts) - verdicts.count(False)
    if certain > most or possible < least:
        return False
    return True if certain >= least and possible <= most else None


def _one_of(check: Checking, wanted: Any, _: Mapping[str, Any], value: Any) -> Verdict:
    verdicts = [check.fits(branch, value) for branch in wanted]
    certain = verdicts.count(True)
    if certain > 1:
        return False
    return None if None in verdicts else certain == 1


RULES: Mapping[str, _Rule] = {
    "type": _type,
    "enum": _enum,
    "const": lambda check, wanted, schema, value: (
        canonical(wanted, check.spend) == canonical(value, check.spend)
    ),
    "minimum": _limit("number", operator.ge),
    "maximum": _limit("number", operator.le),
    "exclusiveMinimum": _limit("number", operator.gt),
    "exclusiveMaximum": _limit("number", operator.lt),
    "multipleOf": _limit("number", _is_multiple),
    "minLength": _limit("string", operator.ge, len),
    "maxLength": _limit("string", operator.le, len),
    "minItems": _limit("array", operator.ge, len),
    "maxItems": _limit("array", operator.le, len),
    "minProperties": _limit("object", operator.ge, len),
    "maxProperties": _limit("object", operator.le, len),
    "pattern": lambda check, wanted, schema, value: (
        not isinstance(value, str) or check.matches(wanted, value)
    ),
    "uniqueItems": _unique,
    "required": _required,
    "dependentRequired": _dependent_required,
    "contains": _contains,
    "anyOf": lambda check, wanted, schema, value: negated(
        all_of(negated(check.fits(inner, value)) for inner in wanted)
    ),
    "oneOf": _one_of,
    "not": lambda check, wanted, schema, value: negated(check.fits(wanted, value)),
}


def canonical(value: Any, spend: Callable[[int], None]) -> str:
    """A text that is equal for values that JSON Schema holds equal: 1 and 1.0 are, 1 and true are not.

    A text, because its hash is secret: numbers can be chosen to fall into one bucket.
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
