"""A handler's JSON Schema (draft 2020-12), checked in the worker within a fixed number of steps.

The usual validators follow every path through a schema: a few `$ref`s that refer to each
other take them hours, and so does a bad `pattern`. This one checks each pair of a
subschema and a value once, and counts its steps. What it cannot decide (a pattern that
needs backtracking, a `$ref` to another document, a rare keyword, too many steps) it leaves
to the run's own process, where the model validates everything before the handler is called.
Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from worker.handlers.json_text import CheckedObject, NotStorable, to_json_text
from worker.handlers.keywords import PARTS, RULES, TYPES, Part, Verdict, all_of, canonical
from worker.handlers.patterns import Pattern, UnusablePattern, cost_of
from worker.model.definitions.units import MAX_DEPTH, depth_of

MAX_BYTES = 256 * 1024
"""Maximum size of a schema as JSON."""
STEPS = 50_000
"""Maximum steps of one check, each a microsecond or so."""
# Maximum nesting of subschemas, `$ref`s included: six Python frames each.
_DEEPEST = 100
# Characters of a value that a message shows.
_SHOWN = 60

# Keywords that decide and that this validator does not support; all others only annotate.
_UNKNOWN = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef")


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not fit, and its path in the value."""

    path: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A keyword of a schema that only the run's own process checks, and why."""

    place: str
    reason: str


class TooCostly(Exception):
    """The steps are used up, or the subschemas nest too deeply."""


def check_schema(schema: object, what: str) -> None:
    """Raise ValueError for a schema that is not an object, too large, too deep, or not storable."""
    if isinstance(schema, CheckedObject):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"the {what} is not an object")
    try:
        text = to_json_text(schema, what)
    except NotStorable as error:
        raise ValueError(str(error)) from None
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"the {what} is larger than {MAX_BYTES // 1024} KiB: shorten its enums and texts")
    if depth_of(schema) > MAX_DEPTH:
        raise ValueError(f"the {what} nests more than {MAX_DEPTH} levels: name the inner models")


class Schema:
    """One handler's schema; each pattern is compiled once, on first use."""

    def __init__(self, root: Mapping[str, Any], *, steps: int = STEPS) -> None:
        self.root = root
        self._steps = steps
        self._patterns: dict[str, Pattern | UnusablePattern] = {}
        self._choices: dict[int, frozenset[str]] = {}

    def problem(self, value: Any) -> Problem | None:
        """The problem nearest to the top, or None if everything fits or that is undecided."""
        check = Check(self, self._steps)
        if check.verdict(self.root, value) is not False:
            return None
        # A budget of its own, with most verdicts cached: every refusal gets its reason.
        check.left = self._steps
        try:
            return check.explain(self.root, value, ())
        except (TooCostly, RecursionError):
            return Problem((), "the params do not fit the handler's schema")

    def knows(self, name: str) -> bool:
        """Whether a property of this name may exist: False if it is not listed and others are not allowed."""
        properties = self.root.get("properties", {})
        return self.root.get("additionalProperties") is not False or name in properties

    def may_take(self, name: str, value: Any) -> bool:
        """Whether the property of this name may have the value; True if that is undecided."""
        properties = self.root.get("properties")
        schema = properties.get(name, True) if isinstance(properties, Mapping) else True
        return Check(self, self._steps).verdict(schema, value) is not False

    def unchecked(self) -> Iterator[Unchecked]:
        """The keywords that are left to the run's own process for every value."""
        try:
            yield from Check(self, self._steps).unchecked(self.root, "")
        except (TooCostly, RecursionError):
            yield Unchecked("(the rest)", "there are too many patterns to look at")

    def pattern(self, text: str, spend: Callable[[int], None]) -> Pattern:
        """Compile a pattern, or return it from the cache; raises UnusablePattern."""
        found = self._patterns.get(text)
        if found is None:
            try:
                cost = cost_of(text)
                if cost.compiling > self._steps:
                    raise UnusablePattern("it is too large once its repetitions are written out")
                spend(len(text) + cost.compiling)
                found = Pattern(text, cost)
            except UnusablePattern as error:
                found = error
            self._patterns[text] = found
        if isinstance(found, UnusablePattern):
            raise found
        return found

    def choices(self, options: Sequence[Any], spend: Callable[[int], None]) -> frozenset[str]:
        """The options of an enum in canonical form."""
        found = self._choices.get(id(options))
        if found is None:
            found = self._choices[id(options)] = frozenset(canonical(option, spend) for option in options)
        return found

    def target(self, reference: object) -> Any:
        """The subschema that a local `$ref` refers to; raises LookupError."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise LookupError("it names another document, and nothing is fetched")
        pointer = unquote(reference[1:])
        if pointer and not pointer.startswith("/"):
            raise LookupError("anchors are not followed")
        found: Any = self.root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and len(part) < 7 and int(part) < len(found):
                found = found[int(part)]
            else:
                raise LookupError("it names nothing in the schema")
            if isinstance(found, Mapping) and isinstance(found.get("$id"), str):
                raise LookupError("the subschema has an $id of its own")
        return found


class Check:
    """One check of one value."""

    def __init__(self, schema: Schema, steps: int) -> None:
        self.schema: Schema = schema
        self.left = steps
        self._depth = 0
        # By identity: schema and value outlive this check.
        self._known: dict[tuple[int, int], Verdict] = {}

    def spend(self, steps: int) -> None:
        """Count steps; raises TooCostly if none are left."""
        self.left -= steps
        if self.left < 0:
            raise TooCostly

    def verdict(self, schema: Any, value: Any) -> Verdict:
        """Whether the value fits; undecided if the steps are used up."""
        try:
            return self.fits(schema, value)
        except (TooCostly, RecursionError):
            return None

    def fits(self, schema: Any, value: Any) -> Verdict:
        """Whether the value fits a subschema; raises TooCostly."""
        self.spend(1)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            return None
        key = (id(schema), id(value))
        if key in self._known:
            return self._known[key]
        # A subschema that refers to itself for the same value is undecided.
        self._known[key] = None
        if self._depth == _DEEPEST:
            raise TooCostly
        self.spend(len(schema))
        self._depth += 1
        found = self._known[key] = all_of(self.keyword(name, schema, value) for name in schema)
        self._depth -= 1
        return found

    def keyword(self, name: str, schema: Mapping[str, Any], value: Any) -> Verdict:
        """The verdict of one keyword; a malformed one is undecided."""
        if name in _UNKNOWN or (name == "$id" and schema is not self.schema.root):
            return None
        try:
            if name in PARTS:
                return all_of(self.fits(inner, part) for _, inner, part in self._parts(name, schema, value))
            rule = RULES.get(name)
            return True if rule is None else rule(self, schema[name], schema, value)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, UnusablePattern):
            return None

    def _parts(self, name: str, schema: Mapping[str, Any], value: Any) -> Iterable[Part]:
        kind, parts_of = PARTS[name]
        if kind is not None:
            if not TYPES[kind](value):
                return ()
            self.spend(len(value))
        return parts_of(self, schema[name], schema, value)

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a pattern matches anywhere in a text; raises UnusablePattern and TooCostly."""
        compiled = self.schema.pattern(pattern, self.spend)
        self.spend(compiled.price(text))
        return compiled.found_in(text)

    def explain(self, schema: Any, value: Any, path: tuple[str, ...]) -> Problem:
        """Why the value does not fit a schema whose verdict is False: the nearest rule that it breaks."""
        self.spend(1)
        if not isinstance(schema, Mapping):
            return Problem(path, f"{_shown(value)} is not allowed")
        failed = [name for name in schema if self.keyword(name, schema, value) is False]
        name = min(failed, key=_INNER.__contains__)
        wanted = schema[name]
        if name in _MESSAGES:
            return Problem(path, f"{_shown(value)} {_MESSAGES[name].format(_WRITTEN.get(name, str)(wanted))}")
        if name == "required":
            missing = next(item for item in wanted if item not in value)
            return Problem((*path, str(missing)), "is missing")
        if name in PARTS:
            for step, inner, part in self._parts(name, schema, value):
                if self.fits(inner, part) is False:
                    further = path if step is None else (*path, step)
                    if inner is False and name == "additionalProperties":
                        return Problem(further, "the handler takes no such param")
                    return self.explain(inner, part, further)
        if name in ("anyOf", "oneOf") and all(self.fits(branch, value) is False for branch in wanted):
            return self._explain_branches(wanted, value, path)
        return Problem(path, f"{_shown(value)} does not meet {name} of the handler's schema")

    def _explain_branches(self, branches: Sequence[Any], value: Any, path: tuple[str, ...]) -> Problem:
        """The form that was meant, if the type or a tag shows it."""
        forms = [self._resolved(branch) for branch in branches]
        if all(self._fails(form, "type", value) for form in forms):
            wanted = " or ".join(dict.fromkeys(_kinds(form["type"]) for form in forms))
            return Problem(path, f"{_shown(value)} is not of type {wanted}")
        meant = [form for form in forms if not self._is_other_form(form, value)]
        if len(meant) == 1:
            return self.explain(meant[0], value, path)
        return Problem(path, f"{_shown(value)} fits none of the forms that the handler takes")

    def _resolved(self, schema: Any) -> Any:
        seen = 0
        while isinstance(schema, Mapping) and set(schema) == {"$ref"} and seen < _DEEPEST:
            schema, seen = self.schema.target(schema["$ref"]), seen + 1
        return schema

    def _is_other_form(self, branch: Any, value: Any) -> bool:
        """Whether a branch has another type, or another constant in one of its properties."""
        if not isinstance(branch, Mapping):
            return True
        if self._fails(branch, "type", value) or self._fails(branch, "const", value):
            return True
        properties = branch.get("properties")
        if not (isinstance(value, Mapping) and isinstance(properties, Mapping)):
            return False
        self.spend(len(properties))
        return any(
            name in value and self._fails(inner, "const", value[name]) for name, inner in properties.items()
        )

    def _fails(self, schema: Any, name: str, value: Any) -> bool:
        return isinstance(schema, Mapping) and name in schema and self.keyword(name, schema, value) is False

    def unchecked(self, schema: Any, place: str) -> Iterator[Unchecked]:
        self.spend(1)
        if isinstance(schema, list):
            for number, inner in enumerate(schema):
                yield from self.unchecked(inner, f"{place}/{number}")
        if not isinstance(schema, Mapping):
            return
        for name, inner in schema.items():
            where = f"{place}/{name}"
            if name in _UNKNOWN:
                yield Unchecked(where, "the keyword is not supported")
            elif name == "$ref" and isinstance(inner, str):
                try:
                    self.schema.target(inner)
                except LookupError as error:
                    yield Unchecked(where, str(error.args[0]))
            elif name == "pattern" and isinstance(inner, str):
                yield from self._unusable([inner], where)
            elif name not in ("default", "examples", "enum", "const"):
                if name == "patternProperties" and isinstance(inner, Mapping):
                    yield from self._unusable(inner, where)
                yield from self.unchecked(inner, where)

    def _unusable(self, patterns: Iterable[str], where: str) -> Iterator[Unchecked]:
        for text in patterns:
            try:
                self.schema.pattern(text, self.spend)
            except UnusablePattern as error:
                yield Unchecked(where, f"{_shown(text)}: {error}")


# --- Messages ----------------------------------------------------------------------------------

# Keywords that are reported only if nothing nearer is wrong.
_INNER = {*PARTS, "anyOf", "oneOf", "not", "contains"} - {"additionalProperties"}

_MESSAGES = {
    "type": "is not of type {}",
    "enum": "is not one of {}",
    "const": "is not {}",
    "minimum": "is less than the minimum of {}",
    "maximum": "is greater than the maximum of {}",
    "exclusiveMinimum": "is not greater than {}",
    "exclusiveMaximum": "is not less than {}",
    "multipleOf": "is not a multiple of {}",
    "minLength": "is shorter than {} characters",
    "maxLength": "is longer than {} characters",
    "minItems": "has fewer than {} items",
    "maxItems": "has more than {} items",
    "minProperties": "has fewer than {} members",
    "maxProperties": "has more than {} members",
    "pattern": "does not match {}",
    "uniqueItems": "has items that are equal",
}


def _kinds(wanted: Any) -> str:
    return wanted if isinstance(wanted, str) else " or ".join(wanted)


def _shown(value: Any) -> str:
    """The beginning of a value."""
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    elif isinstance(value, list):
        value = value[:_SHOWN]
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


# How a message writes a keyword's own value, if not as it is.
_WRITTEN: Mapping[str, Callable[[Any], str]] = {
    "type": _kinds,
    "enum": _shown,
    "const": _shown,
    "pattern": _shown,
}
