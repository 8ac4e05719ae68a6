"""What counts as a change, and how it is told."""

from __future__ import annotations

import pytest

from worker.operations.changes import Change, differing, same


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, 1.0, True),
        (1e22, 10**22, True),
        (True, 1, False),
        (False, 0, False),
        (None, None, True),
        ({"a": [1, {"b": True}]}, {"a": [1.0, {"b": True}]}, True),
        ({"a": [1, {"b": True}]}, {"a": [1, {"b": 1}]}, False),
        ([1, 2], [1], False),
        ({"a": None}, {}, False),
        ("1", 1, False),
    ],
)
def test_values_are_the_same_where_json_says_so(one, other, equal):
    assert same(one, other) is equal
    assert same(other, one) is equal


def test_only_what_differs_is_named_with_both_values():
    before = {"handler": "a", "timeout": "1h", "params": {"x": 1}}
    after = {"handler": "b", "params": {"x": 1}, "priority": 2}

    assert differing(before, after) == {"handler": ("a", "b"), "priority": (None, 2), "timeout": ("1h", None)}


def test_a_change_is_a_row_of_json():
    change = Change("definition", "change", "org_acme", "digest", {"timeout": ("1h", "2h")})

    assert change.as_row() == {
        "kind": "definition",
        "action": "change",
        "org": "org_acme",
        "name": "digest",
        "fields": {"timeout": {"before": "1h", "after": "2h"}},
    }
