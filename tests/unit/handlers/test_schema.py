"""The worker's check of params: as JSON Schema says, in a bounded number of steps, without a network."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, ValidationError

from worker.handlers.json_text import to_json_text
from worker.handlers.schema import MAX_BYTES, Schema, check_schema

# --- Agreement with the reference implementation -----------------------------------------------------

NAMES = st.sampled_from(["a", "b", "ab"])
PATTERNS = st.sampled_from(["a", "^a", "b$", "^[ab]+$", "1", "^$"])
TYPES = st.sampled_from(["object", "array", "string", "boolean", "null", "number", "integer"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-4, 4)
    | st.sampled_from([0.5, 1.0, 2.0, -1.5])
    | st.text("ab1", max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    small, several = st.integers(0, 3), st.lists(inner, min_size=1, max_size=3)
    by_name, names = st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES, max_size=2, unique=True)
    bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength")
    sizes = ("minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
    return st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys((*bounds, *sizes), small),
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), several),
            **dict.fromkeys(("contains", "propertyNames", "items", "not", "if", "then", "else"), inner),
            **dict.fromkeys(("additionalProperties",), inner),
            **dict.fromkeys(("properties", "dependentSchemas"), by_name),
            "type": TYPES | st.lists(TYPES, min_size=1, max_size=2, unique=True),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "multipleOf": st.sampled_from([1, 2, 0.5]),
            "pattern": PATTERNS,
            "uniqueItems": st.booleans(),
            "required": names,
            "dependentRequired": st.dictionaries(NAMES, names, max_size=2),
            "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
            "$ref": st.sampled_from(["#/$defs/x", "#/$defs/y"]),
        },
    )


LEAVES = st.booleans() | st.fixed_dictionaries(
    {}, optional={"type": TYPES, "pattern": PATTERNS, "minimum": st.integers(0, 2), "const": SCALARS}
)
SCHEMAS = st.recursive(LEAVES, _larger, max_leaves=6)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.tuples(SCHEMAS, SCHEMAS, SCHEMAS), VALUES)
def test_it_agrees_with_the_reference_implementation(parts: tuple[Any, Any, Any], value: Any) -> None:
    schema = {"allOf": [parts[0]], "$defs": {"x": parts[1], "y": parts[2]}}
    problem = Schema(schema).problem(value)

    assert problem is None or problem.message
    # Definitions may refer to each other endlessly, which the reference does not notice.
    with contextlib.suppress(RecursionError):
        assert (problem is None) == Draft202012Validator(schema).is_valid(value)


class Address(BaseModel):
    street: str = Field(pattern="^[A-Za-z ]+$", max_length=30)
    number: int = Field(ge=1, lt=1000)


class Mail(BaseModel):
    kind: Literal["mail"]
    to: Address | None = None


class Call(BaseModel):
    kind: Literal["call"]
    digits: str = Field(pattern=r"^\+?\d{4,12}$")


class Params(BaseModel):
    how: Annotated[Mail | Call, Field(discriminator="kind")]
    tags: Annotated[list[str], Field(max_length=3)] = []
    size: Literal["s", "l"] = "s"
    rate: float = Field(1.0, gt=0, multiple_of=0.1)


ADDRESSES = st.fixed_dictionaries(
    {
        "street": st.sampled_from(["Main Street", "x1", "a" * 31, 5]),
        "number": st.sampled_from([0, 1, 999, "7"]),
    }
)
HOW = st.fixed_dictionaries(
    {"kind": st.sampled_from(["mail", "call", "fax"])},
    optional={"to": ADDRESSES | st.none(), "digits": st.sampled_from(["1234", "+49 30", "12", None])},
)
PARAMS = st.fixed_dictionaries(
    {"how": HOW},
    optional={
        "tags": st.lists(st.sampled_from(["a", 1]), max_size=4),
        "size": st.sampled_from(["s", "m"]),
        "rate": st.sampled_from([0.3, 0.25, 0, 2]),
    },
)


@settings(max_examples=150, deadline=None)
@given(PARAMS)
def test_it_agrees_with_the_model_that_the_schema_comes_from(params: dict[str, Any]) -> None:
    """What the worker refuses the run's own process refuses too, and the other way round."""
    try:
        Params.model_validate(params, strict=True)
        fits = True
    except ValidationError:
        fits = False

    assert (Schema(Params.model_json_schema()).problem(params) is None) == fits


# --- What a refusal says ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "path", "message"),
    [
        ({}, "how", "is missing"),
        ({"how": {"kind": "fax"}}, "how", "{'kind': 'fax'} fits none of the forms that the handler takes"),
        ({"how": {"kind": "call"}}, "how.digits", "is missing"),
        (
            {"how": {"kind": "call", "digits": "12"}},
            "how.digits",
            r"'12' does not match '^\\+?\\d{4,12}$'",
        ),
        (
            {"how": {"kind": "mail", "to": {"street": "Main", "number": 0}}},
            "how.to.number",
            "0 is less than the minimum of 1",
        ),
        ({"how": {"kind": "mail", "to": 5}}, "how.to", "5 is not of type object or null"),
        ({"how": {"kind": "mail"}, "tags": ["a", 1]}, "tags.1", "1 is not of type string"),
        ({"how": {"kind": "mail"}, "size": "m"}, "size", "'m' is not one of ['s', 'l']"),
        ({"how": {"kind": "mail"}, "rate": 0}, "rate", "0 is not greater than 0"),
    ],
)
def test_a_refusal_names_the_place_and_the_rule(params: dict[str, Any], path: str, message: str) -> None:
    problem = Schema(Params.model_json_schema()).problem(params)

    assert problem is not None
    assert (".".join(problem.path), problem.message) == (path, message)


def test_a_refusal_shows_only_the_beginning_of_a_value() -> None:
    problem = Schema({"type": "integer"}).problem("x" * 100_000)

    assert problem is not None
    assert len(problem.message) < 100


# --- Bounded, whatever a plug-in wrote ----------------------------------------------------------------


def _doubling(keyword: str, levels: int = 40) -> dict[str, Any]:
    """A few hundred bytes that name each other: 2 to the power of `levels` paths."""
    steps = {
        f"d{level}": {keyword: [{"$ref": f"#/$defs/d{level - 1}"}, {"$ref": f"#/$defs/d{level - 1}"}]}
        for level in range(1, levels + 1)
    }
    return {"$defs": {"d0": {"type": "integer"}, **steps}, "$ref": f"#/$defs/d{levels}"}


def _tree() -> dict[str, Any]:
    """Each level may be one of two forms, and both say the same of the next."""
    node = {"$ref": "#/$defs/node"}
    forms = [{"properties": {"x": node}, "required": [name]} for name in ("x", "y")]
    return {"$defs": {"node": {"anyOf": forms}}, "$ref": "#/$defs/node"}


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"x": value}
    return value


MANY = list(range(40_000))
HOSTILE: dict[str, tuple[dict[str, Any], Any]] = {
    "allOf": (_doubling("allOf"), 1),
    "anyOf": (_doubling("anyOf"), "x"),
    "oneOf": (_doubling("oneOf"), "x"),
    "tree": (_tree(), _nested(60)),
    "loop": ({"$ref": "#"}, {}),
    "chain": (
        {
            "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(4_000)},
            "$ref": "#/$defs/d0",
        },
        1,
    ),
    "enum": ({"items": {"enum": MANY[:20_000]}}, MANY),
    "allOf of many": ({"items": {"allOf": [True] * 40_000}}, MANY),
    "types": ({"items": {"type": ["string"] * 30_000}}, MANY),
    "required": ({"items": {"required": ["a"] * 30_000}}, [{"a": 1} for _ in MANY]),
    "dependent": ({"items": {"dependentRequired": {str(n): ["a"] for n in MANY}}}, [{}] * 1_000),
    "colliding": ({"uniqueItems": True}, [n * (2**61 - 1) for n in MANY]),
    "long items": ({"anyOf": [{"uniqueItems": True, "maxItems": 1}] * 500}, ["x" * 200] * 1_000),
    "repetitions": ({"pattern": "(?:[xz]?){50000}[^xz]"}, "xz" * 5_000),
    "automaton": ({"pattern": "(?:a.{300}b|b.{300}c|c.{300}a)+[^abc]"}, "abcba" * 20_000),
    "classes": ({"allOf": [{"pattern": rf"^\\w{{1,100}}{n}$"} for n in range(500)]}, "é" * 100),
    "names": (
        {"patternProperties": {f"^{n}a": False for n in range(10_000)}},
        {str(n): 1 for n in range(20_000)},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_costs_a_bounded_number_of_calls(name: str) -> None:
    """Counted by the interpreter, not by the check itself."""
    schema, value = HOSTILE[name]
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    check = Schema(schema, steps=5_000)
    sys.setprofile(count)
    try:
        check.problem(value)
    finally:
        sys.setprofile(None)

    # Some ten calls a step, for the verdict and then for its reason.
    assert calls < 2 * 15 * 5_000


def test_the_step_budget_is_what_bounds_it() -> None:
    """The control: without a budget the same checks go on."""
    schema, value = HOSTILE["enum"]
    wrong = [*value[:20_000], "not one of them"]

    assert Schema(schema).problem(wrong) is None
    unbounded = Schema(schema, steps=10**9).problem(wrong)
    assert unbounded is not None
    assert unbounded.path == ("20000",)


def test_doubling_references_are_judged_once() -> None:
    problem = Schema(_doubling("allOf")).problem("x")

    assert problem is not None
    assert problem.message == "'x' is not of type integer"


# --- What it leaves to the run's own process -----------------------------------------------------------


@pytest.mark.parametrize(
    "keyword",
    [
        {"pattern": "^(?!x)y$"},
        {"pattern": r"(a)\1"},
        {"pattern": "("},
        {"pattern": "x" * 1_001},
        {"$ref": "other.json"},
        {"$ref": "#named"},
        {"$ref": "#/$defs/absent"},
        {"unevaluatedProperties": False},
        {"$dynamicRef": "#node"},
    ],
)
def test_only_what_it_cannot_tell_is_left_open(keyword: dict[str, Any]) -> None:
    """Never refused for it, in no combination; and all else is still checked."""
    value = {"a": "z"}
    for schema in (keyword, {"not": keyword}, {"oneOf": [keyword, False]}, {"if": keyword, "then": False}):
        assert Schema({"properties": {"a": schema}}).problem(value) is None
        assert Schema({"properties": {"a": schema}, "required": ["b"]}).problem(value) is not None
    assert [left.place for left in Schema({"properties": {"a": keyword}}).unchecked()] == [
        f"/properties/a/{next(iter(keyword))}"
    ]


def test_nothing_is_left_open_of_a_plain_model() -> None:
    assert list(Schema(Params.model_json_schema()).unchecked()) == []


# --- What the catalogue takes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ([], "the schema is not an object"),
        ({"enum": ["x" * 1_000] * 300}, "the schema is larger than 256 KiB: shorten its enums and texts"),
        ({"not": _nested(62)}, None),
        ({"not": _nested(63)}, "the schema nests more than 64 levels: name the inner models"),
        ({"title": "a\0b"}, "the schema contains a NUL character, which databases cannot store"),
        ({"minimum": float("nan")}, "the schema is not JSON: NaN and infinity cannot be written as JSON"),
    ],
)
def test_a_schema_is_bounded_when_the_catalogue_takes_it(schema: Any, problem: str | None) -> None:
    if problem is None:
        check_schema(schema, "schema")
    else:
        with pytest.raises(ValueError) as refused:
            check_schema(schema, "schema")
        assert str(refused.value) == problem


def test_the_bound_is_far_above_what_a_model_has() -> None:
    assert len(to_json_text(Params.model_json_schema(), "schema")) * 100 < MAX_BYTES
