"""Options of a wait: which lists are taken, and which answers are among them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.model.runs.waits import MAX_OPTIONS, check_options, is_allowed, is_option


@pytest.mark.parametrize("options", [["yes", "no"], (True, False), [None], [1, 2.5, "1", True], ["x"] * 1])
def test_a_list_of_distinct_scalars_is_taken(options: Any) -> None:
    assert check_options(options) == tuple(options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "a list of 1 to 50"),
        ("yes", "a list of 1 to 50"),
        ({"yes": 1}, "a list of 1 to 50"),
        (list(range(MAX_OPTIONS + 1)), "a list of 1 to 50"),
        (["yes", ["no"]], "number 2 is not a text, a number, true, false or null"),
        ([{"a": 1}], "number 1 is not"),
        (["yes", "no", "yes"], "number 3 is there twice"),
        ([1, 1.0], "number 2 is there twice"),
    ],
)
def test_any_other_list_is_refused(options: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_options(options)


@pytest.mark.parametrize("answer", ["1", "true", "[1]", "null", '"yes "', '"Yes"', "{}", '["yes"]'])
def test_an_answer_is_compared_by_its_json_value(answer: str) -> None:
    assert not is_option(("yes", 2, False), json.loads(answer))


def test_true_is_not_one() -> None:
    """The control: Python says that they are equal."""
    assert not is_option((1, 0), True) and not is_option((True,), 1)
    assert is_option((1,), 1.0) and is_option((True, None), None)
    assert True in (1, 0)


def test_a_wait_without_options_takes_anything() -> None:
    assert is_allowed({"options": None}, {"any": "thing"})
    assert not is_allowed({"options": ["yes"]}, {"any": "thing"})
