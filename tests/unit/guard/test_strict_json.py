"""JSON from strangers is read in linear time, and refused by what it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.guard.strict_json import MAX_DEPTH, MalformedJson, loads

DEEP = "[" * (MAX_DEPTH + 1)


# The old scan needed hours for these: it began anew at every quote.
@pytest.mark.parametrize("end", ["", "\\", '\\"', '"'])
@pytest.mark.parametrize("piece", ['\\"', "\\\\", '"', "a", '"\\"'])
def test_quotes_and_backslashes_without_end_are_read_in_linear_time(piece: str, end: str) -> None:
    text = DEEP + '"' + piece * 500_000 + end

    with pytest.raises(MalformedJson):
        loads(text.encode())


STRINGS = st.text(st.sampled_from('[]{}"\\,:a\n'), max_size=20)


@given(
    st.recursive(
        STRINGS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3)
    )
)
def test_brackets_within_strings_do_not_count_as_depth(value: Any) -> None:
    text = json.dumps(value)

    try:
        assert loads(text.encode()) == value
    except MalformedJson as refused:
        assert refused.code == "depth"
        assert _depth(value) > MAX_DEPTH


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


@pytest.mark.parametrize(("levels", "taken"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_it_nests_so_deep_and_no_deeper(levels: int, taken: bool) -> None:
    # Brackets in a string, which ends with an escaped quote, do not count.
    text = "[" * levels + json.dumps('[[[[[[[[[[[[[[[["') + "]" * levels

    if taken:
        loads(text.encode())
    else:
        with pytest.raises(MalformedJson, match="depth"):
            loads(text.encode())
