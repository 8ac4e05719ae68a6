"""A handler's JSON Schema, checked in the worker: bounded steps, whatever a plug-in wrote.

A validator of the usual kind follows every path through a schema: a few `$ref`s that
name each other take it hours, and so does a bad `pattern`. This one judges each pair
of a subschema and a value once, and counts its steps. What it cannot tell (a pattern
that needs backtracking, a `$ref` to another document, a rare keyword, too many steps)
it leaves to the run's own process, where the model checks everything again before the
handler is called. Nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from worker.definitions.units import MAX_DEPTH, depth_of
from worker.handlers.json_text import NotStorable, to_json_text
from worker.handlers.keywords import (
    INNER,
    RULES,
    WORDS,
    Verdict,
    canonical,
    first_item,
    items_of,
    kinds,
    members,
    shown,
)
from worker.handlers.patterns import Pattern, UnusablePattern, cost_of

MAX_BYTES = 256 * 1024
"""A schema as JSON at most."""
STEPS = 50_000
"""Steps that one check takes at most, each a microsecond or so."""
# Subschemas that are judged within each other, `$ref`s included: six frames of Python each.
_DEEPEST = 100

# Keywords that decide and that this validator does not know; all others only annotate.
_UNKNOWN = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef")


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not fit, by its path in the value."""

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
    """Refuse a schema that no honest model has. `what` names it.

    Raises:
        ValueError: it is not an object, too large, nested too deeply, or not storable.
    """
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
    """One handler's schema, as draft 2020-12 reads it; patterns are compiled once, at first need."""

    def __init__(self, root: Mapping[str, Any], *, steps: int = STEPS) -> None:
        self.root = root
        self._steps = steps
        self._patterns: dict[str, Pattern | UnusablePattern] = {}
        self._choices: dict[int, frozenset[str]] = {}

    def problem(self, value: Any) -> Problem | None:
        """What certainly does not fit, nearest to the top; None where all fits or it cannot be told."""
        check = _Check(self)
        if check.verdict(self.root, value) is not False:
            return None
        # A budget of its own, and most of it is remembered: a refusal always has its reason.
        check.left = self._steps
        try:
            return check.explain(self.root, value, ())
        except (TooCostly, RecursionError):
            return Problem((), "the params do not fit the handler's schema")

    def knows(self, name: str) -> bool:
        """Whether there may be a property of this name; False only where no other than those listed may."""
        properties = self.root.get("properties", {})
        return self.root.get("additionalProperties") is not False or name in properties

    def may_take(self, name: str, value: Any) -> bool:
        """Whether the property of this name may have the value; True where it cannot be told."""
        properties = self.root.get("properties")
        schema = properties.get(name, True) if isinstance(properties, Mapping) else True
        return _Check(self).verdict(schema, value) is not False

    def unchecked(self) -> Iterator[Unchecked]:
        """The keywords that are left to the run's own process, whatever the value is."""
        check = _Check(self)
        try:
            yield from check.unchecked(self.root, "")
        except (TooCostly, RecursionError):
            yield Unchecked("(the rest)", "there are too many patterns to look at")

    def pattern(self, text: str, spend: Callable[[int], None]) -> Pattern:
        """A pattern, compiled.

        Raises:
            UnusablePattern: the engine does not take it.
        """
        found = self._patterns.get(text)
        if found is None:
            found = self._patterns[text] = self._compiled(text, spend)
        if isinstance(found, UnusablePattern):
            raise found
        return found

    def _compiled(self, text: str, spend: Callable[[int], None]) -> Pattern | UnusablePattern:
        try:
            cost = cost_of(text)
            if cost.compiling > self._steps:
                return UnusablePattern("it is too large once its repetitions are written out")
            spend(len(text) + cost.compiling)
            return Pattern(text, cost)
        except UnusablePattern as error:
            return error

    def choices(self, options: Sequence[Any], spend: Callable[[int], None]) -> frozenset[str]:
        """The options of an enum in canonical form."""
        found = self._choices.get(id(options))
        if found is None:
            found = self._choices[id(options)] = frozenset(canonical(option, spend) for option in options)
        return found

    def target(self, reference: object) -> Any:
        """The subschema that a local `$ref` names.

        Raises:
            LookupError: it names another document, or nothing.
        """
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


class _Check:
    """One check of one value. A verdict is True, False, or None where it cannot be told."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.left = schema._steps
        self._depth = 0
        # By identity: schema and value live as long as this does.
        self._known: dict[tuple[int, int], Verdict] = {}

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TooCostly

    def verdict(self, schema: Any, value: Any) -> Verdict:
        """Whether the value fits, for a caller from outside."""
        try:
            return self.fits(schema, value)
        except (TooCostly, RecursionError):
            return None

    def fits(self, schema: Any, value: Any) -> Verdict:
        """Whether the value fits a subschema.

        Raises:
            TooCostly: the steps are used up.
        """
        self.spend(1)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            return None
        key = (id(schema), id(value))
        if key in self._known:
            return self._known[key]
        # A subschema that needs itself for the same value cannot be told.
        self._known[key] = None
        if self._depth == _DEEPEST:
            raise TooCostly
        self.spend(len(schema))
        self._depth += 1
        found = self._fits(schema, value)
        self._depth -= 1
        self._known[key] = found
        return found

    def _fits(self, schema: Mapping[str, Any], value: Any) -> Verdict:
        found: Verdict = True
        for name in schema:
            verdict = self.keyword(name, schema, value)
            if verdict is False:
                return False
            if verdict is None:
                found = None
        return found

    def keyword(self, name: str, schema: Mapping[str, Any], value: Any) -> Verdict:
        """The verdict of one keyword; one that is malformed cannot be told."""
        if name in _UNKNOWN or (name == "$id" and schema is not self._schema.root):
            return None
        rule = RULES.get(name)
        if rule is None:
            return True
        try:
            return rule(self, schema[name], schema, value)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, UnusablePattern):
            return None

    def explain(self, schema: Any, value: Any, path: tuple[str, ...]) -> Problem:
        """Why the value does not fit a schema whose verdict is False: what is wrong here, else further in."""
        self.spend(1)
        if not isinstance(schema, Mapping):
            return Problem(path, f"{shown(value)} is not allowed")
        failed = [name for name in schema if self.keyword(name, schema, value) is False]
        failed.sort(key=lambda name: name in INNER)
        name = failed[0]
        wanted = schema[name]
        if name in WORDS:
            return Problem(path, WORDS[name](wanted, value))
        match name:
            case "required":
                missing = next(item for item in wanted if item not in value)
                return Problem((*path, str(missing)), "is missing")
            case "additionalProperties" | "patternProperties" | "properties" | "propertyNames":
                return self._explain_member(name, schema, value, path)
            case "items" | "prefixItems":
                for place, (inner, item) in enumerate(
                    items_of(name, schema, value), first_item(name, schema)
                ):
                    if self.fits(inner, item) is False:
                        return self.explain(inner, item, (*path, str(place)))
            case "$ref":
                return self.explain(self.target(wanted), value, path)
            case "allOf":
                return self.explain(next(s for s in wanted if self.fits(s, value) is False), value, path)
            case "if":
                branch = "then" if self.fits(wanted, value) else "else"
                return self.explain(schema[branch], value, path)
            case "dependentSchemas":
                inner = next(s for n, s in wanted.items() if n in value and self.fits(s, value) is False)
                return self.explain(inner, value, path)
            case "anyOf" | "oneOf" if all(self.fits(branch, value) is False for branch in wanted):
                return self._explain_branches(wanted, value, path)
        return Problem(path, f"{shown(value)} does not meet {name} of the handler's schema")

    def _explain_member(
        self, name: str, schema: Mapping[str, Any], value: Mapping[str, Any], path: tuple[str, ...]
    ) -> Problem:
        for key, inner, what in members(self, name, schema, value):
            if self.fits(inner, what) is False:
                if inner is False and name == "additionalProperties":
                    return Problem((*path, key), "the handler takes no such param")
                return self.explain(inner, what, (*path, key))
        return Problem(path, f"{shown(value)} does not meet {name} of the handler's schema")

    def _explain_branches(self, branches: Sequence[Any], value: Any, path: tuple[str, ...]) -> Problem:
        """The one form that was meant, where that can be told: by type, or by a tag."""
        forms = [self._resolved(branch) for branch in branches]
        if all(self._fails(form, "type", value) for form in forms):
            wanted = " or ".join(dict.fromkeys(kinds(form["type"]) for form in forms))
            return Problem(path, f"{shown(value)} is not of type {wanted}")
        meant = [form for form in forms if not self._another(form, value)]
        if len(meant) == 1:
            return self.explain(meant[0], value, path)
        return Problem(path, f"{shown(value)} fits none of the forms that the handler takes")

    def _resolved(self, schema: Any) -> Any:
        seen = 0
        while isinstance(schema, Mapping) and set(schema) == {"$ref"} and seen < _DEEPEST:
            schema, seen = self.target(schema["$ref"]), seen + 1
        return schema

    def _another(self, branch: Any, value: Any) -> bool:
        """Whether a branch is another form than was meant: of another type, or with another constant."""
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
                    self.target(inner)
                except LookupError as error:
                    yield Unchecked(where, str(error.args[0]))
            elif name == "pattern" and isinstance(inner, str):
                yield from self._unusable(inner, where)
            elif name not in ("default", "examples", "enum", "const"):
                if name == "patternProperties" and isinstance(inner, Mapping):
                    for text in inner:
                        yield from self._unusable(text, where)
                yield from self.unchecked(inner, where)

    def _unusable(self, text: str, where: str) -> Iterator[Unchecked]:
        try:
            self._schema.pattern(text, self.spend)
        except UnusablePattern as error:
            yield Unchecked(where, f"{shown(text)}: {error}")

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a pattern matches somewhere in a text.

        Raises:
            UnusablePattern: the engine does not take it.
            TooCostly: the steps are used up.
        """
        compiled = self._schema.pattern(pattern, self.spend)
        self.spend(compiled.price(text))
        return compiled.found_in(text)

    def target(self, reference: Any) -> Any:
        return self._schema.target(reference)

    def is_among(self, options: Any, value: Any) -> Verdict:
        if not isinstance(options, list):
            return None
        return canonical(value, self.spend) in self._schema.choices(options, self.spend)
