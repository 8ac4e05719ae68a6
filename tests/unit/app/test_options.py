"""How the texts of shared options are read."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import pytest

from tests.fakes.clock import ManualClock, utc
from worker.errors import UsageError
from worker.kit.options import read_pairs, read_since, read_text
from worker.model.definitions.units import parse_time


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2027-01-01T08:00:00Z", utc("2027-01-01T08:00")),
        ("2027-01-01T08:00:00+02:00", utc("2027-01-01T06:00")),
        ("2027-01-01", utc("2027-01-01T00:00")),
        ("2027-01-01T08:00", utc("2027-01-01T08:00")),
        ("yesterday", utc("2029-12-31T00:00")),
        ("monday", utc("2029-12-31T00:00")),
        ("2h", utc("2029-12-31T22:00")),
        ("1d", utc("2029-12-31T00:00")),
    ],
)
def test_an_instant_is_rfc_3339_a_date_or_a_duration_ago(clock: ManualClock, text: str, instant: datetime):
    assert parse_time(text, clock, name="--since") == instant


@pytest.mark.parametrize(
    "text", ["", "someday", "2027-01-01T25:00", "-2h", "2027-13-01", "0001-01-01", "0001-01-01T00:00+23:00"]
)
def test_any_other_instant_is_refused_by_its_option(clock: ManualClock, text: str):
    with pytest.raises(UsageError, match="--from .* is not a time"):
        parse_time(text, clock, name="--from")


def test_without_since_there_is_no_bound(clock: ManualClock):
    assert read_since(None, clock) is None


def test_a_param_is_json_where_it_is_and_text_where_it_is_not():
    pairs = ["n=3", "deep=true", "list=[1, 2]", 'text="3"', "collection=faq", "url=https://a/?b=c", "empty="]

    assert read_pairs(pairs, option="--param") == {
        "n": 3,
        "deep": True,
        "list": [1, 2],
        "text": "3",
        "collection": "faq",
        "url": "https://a/?b=c",
        "empty": "",
    }


@pytest.mark.parametrize("text", ["-Infinity", "NaN", "2027-01-01", "10.0.0.1", "[1", "{x}"])
def test_a_param_that_only_looks_like_json_is_text(text: str):
    assert read_pairs([f"p={text}"], option="--param") == {"p": text}


def test_a_param_that_nests_too_deeply_to_be_read_is_refused():
    with pytest.raises(UsageError, match="--param deep is nested too deeply"):
        read_pairs(["deep=" + "[" * 100_000], option="--param")


@pytest.mark.parametrize("pair", ["collection", "=faq"])
def test_a_param_without_name_or_equals_is_refused(pair: str):
    with pytest.raises(UsageError, match="is not NAME=VALUE"):
        read_pairs([pair], option="--param")


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Zürich\n".encode())))

    assert read_text("-") == "Zürich\n"


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_text(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_text(str(tmp_path))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(str(tmp_path / "binary"))
