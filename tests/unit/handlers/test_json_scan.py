"""A bounded check of JSON text: it takes what `check_json_text` takes, in small steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.handlers.json_scan import STEP, Scan
from worker.handlers.json_text import DEEPEST, NotStorable, check_json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=30,
)
# Pieces that are valid in some places only.
PIECES = st.sampled_from(
    [
        *("{", "}", "[", "]", ",", ":", '"', '"a"', '"a":', "1", "-0.5e3", "01", "1.", "null", "nul", "NaN"),
        *(" ", "\n", "\x0b", "\\", '"\\u0000"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\ude00"', '"\\\\u0000"'),
        *('"\\\\ud83d\\\\ude00"', '"\\\\\\ude00"', "[]", "{}", "[[]]", '{"a":[]}', "\ud800", "\0", "é"),
    ]
)


def takes(check: Any, text: str) -> bool:
    try:
        check(text)
    except NotStorable:
        return False
    return True


def scan(text: str, work: int = STEP) -> int:
    """Scan a text; returns the number of steps."""
    steps, one = 1, Scan(text, "result")
    while not one.step(work):
        steps += 1
    return steps


def same(text: str) -> None:
    expected = takes(lambda given: check_json_text(given, "result"), text)
    assert takes(scan, text) is expected
    assert takes(lambda given: scan(given, 1), text) is expected


@given(VALUES, st.booleans())
def test_it_takes_what_can_be_stored(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if "\ud800" <= max(text) <= "\udfff":
        return  # a frame is UTF-8, which has no surrogates
    same(text)


@given(st.lists(PIECES, max_size=12).map("".join))
@example("[" * DEEPEST + "]" * DEEPEST)
@example("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))
@example("[" * DEEPEST + "{}" + "]" * DEEPEST)
@example('{"a":' * DEEPEST + "1" + "}" * DEEPEST)
@example('"' + '\\"' * 2_000 + '"')
@example('{"' + "\\\\" * 2_000 + '":1}')
@example('{"' + "\\\\" * 2_000 + '"}')
@example('"' + "\\n" * 2_000)
@example("[" + "1," * 200 + "]")
@example('{"a":1,}')
def test_it_refuses_what_cannot(text: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    same(text)


@pytest.mark.parametrize("part", ["[]", "[0]", "[[0]]", '{"a":{}}', '"x"', "12", '{"a":1,"b":[1,2]}'])
def test_a_step_reads_little_of_a_hostile_text(part: str) -> None:
    """Without the bound, as the control, one step reads all of it."""
    text = "[" + ",".join([part] * (500_000 // (len(part) + 1))) + "]"

    assert scan(text) > 2
    assert scan(text, 10**9) == 1
