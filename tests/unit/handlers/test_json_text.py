"""JSON text for a database: as deep and as large as every reader takes it, whoever wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.handlers import json_text
from worker.handlers.json_text import DEEPEST, NotStorable, check_json_text, to_json_text
from worker.model.definitions.units import depth_of


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_a_value_nests_at_most_200_levels() -> None:
    assert to_json_text(_nested(DEEPEST), "result") == "[" * DEEPEST + "1" + "]" * DEEPEST
    for levels in (DEEPEST + 1, 100_000):
        with pytest.raises(NotStorable, match="the result nests more than 200 levels"):
            to_json_text(_nested(levels), "result")


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)

    with pytest.raises(NotStorable):
        to_json_text(value, "checkpoint")


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert to_json_text([[]] * 1_000, "result").count("[") == 1_001


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_written_is_taken(value: Any) -> None:
    try:
        text = to_json_text(value, "result")
    except NotStorable:
        return
    check_json_text(text, "result")


@given(VALUES)
def test_the_levels_of_a_text_are_those_of_its_value(value: Any) -> None:
    text = json.dumps([value], ensure_ascii=False)

    assert json_text._depth_of(text) == depth_of([value])


@pytest.mark.parametrize("text", ['["[[[{{{"]', r'["\\", "]\"]"]', '"[{"', "1"])
def test_brackets_in_texts_are_no_levels(text: str) -> None:
    assert json_text._depth_of(text) == depth_of(json.loads(text))
