"""Durations and sizes as people write them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.model.definitions.units import format_duration, format_memory, parse_duration, parse_memory


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("30s", timedelta(seconds=30)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(days=1)),
        ("2w", timedelta(weeks=2)),
        ("1h30m", timedelta(minutes=90)),
        ("250ms", timedelta(milliseconds=250)),
        ("0.5s", timedelta(milliseconds=500)),
        ("0s", timedelta(0)),
    ],
)
def test_a_duration_is_text_with_units(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text", ["", "30", "s", "1 h", "-5s", "5 minutes", "1e3s", "1h,2m", 31, None, "99999d"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"duration|hundred years"):
        parse_duration(text)


@given(st.timedeltas(timedelta(0), timedelta(days=36_000)))
def test_a_formatted_duration_reads_back_exactly(duration):
    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 * 2**20), ("1GiB", 2**30), ("2 GB", 2 * 10**9), ("1000B", 1000)]
)
def test_a_size_is_text_with_a_unit(text, size):
    assert parse_memory(text) == size
    assert parse_memory(format_memory(size)) == size


@pytest.mark.parametrize("text", ["", "512", "MiB", "-1MiB", "1.5GiB", "512mib", 513, None])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_memory(text)
