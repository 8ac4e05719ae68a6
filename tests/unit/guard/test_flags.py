"""Flags: which value a flag has, and when it counts as on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.fakes.clock import START
from worker.guard.claims import Claims, Flag, flag_is, flag_value

CLAIMS = Claims("org_a", "client", frozenset(), {}, {}, START, START)


def having(flag: Flag | None = None, prop: Any = None) -> Claims:
    return replace(
        CLAIMS,
        flags={} if flag is None else {"f": flag},
        properties={} if prop is None else {"f": prop},
    )


@pytest.mark.parametrize(
    ("flag", "prop", "equals", "expected"),
    [
        (None, None, True, False),
        (Flag("boolean", True), None, True, True),
        (Flag("boolean", False), None, True, False),
        (Flag("boolean", False), None, False, True),
        (None, None, False, True),
        (None, None, 0, False),
        (Flag("number", 1), None, True, False),
        (Flag("number", 1), None, 1, True),
        (Flag("number", 1.0), None, 1, True),
        (Flag("boolean", True), None, 1, False),
        (Flag("string", "true"), None, True, False),
        (Flag("string", "beta"), None, "beta", True),
        (Flag("string", "2"), None, 2, False),
        (Flag("z", True), None, True, False),
        (None, True, True, True),
        (None, "true", True, True),
        (None, "TRUE", True, True),
        (None, "false", True, False),
        (None, "yes", True, False),
        (None, "beta", "beta", True),
        (None, "2", 2, True),
        (None, "many", 2, False),
        (Flag("boolean", False), True, True, False),
    ],
)
def test_a_flag_is_on_only_with_exactly_the_value_named(
    flag: Flag | None, prop: Any, equals: Any, expected: bool
) -> None:
    """Absent is off, which is false; a property of the name stands in for a flag; 1 is not true."""
    assert flag_is(having(flag, prop), "f", equals) is expected


def test_the_value_of_a_flag_falls_back_to_the_property_and_the_default() -> None:
    """What a handler reads by `ctx.flag`."""
    assert flag_value(having(Flag("string", "beta"), "other"), "f") == "beta"
    assert flag_value(having(None, "true"), "f") is True
    assert flag_value(having(None, "gpt-4"), "f") == "gpt-4"
    assert flag_value(CLAIMS, "f", "default") == "default"
