"""`runs list` for people: why, how long, and a table that fits the terminal."""

from __future__ import annotations

import io
import os
import sys
from datetime import timedelta

import pytest

from tests.fakes.clock import utc
from worker.kit.output import RUN_CELLS, Format, print_rows, took, why
from worker.store.lists import RUNS

ID = "0192aaaa-0000-7abc-8000-000000000001"
SOON = utc("2030-01-01T03:04:00")
RUN = {
    "id": ID,
    "org": "org_with_a_rather_long_code",
    "definition": "nightly-export-of-everything",
    "scheduled_for": utc("2030-01-01T03:00:00"),
    "state": "failed",
    "reason": "error",
    "detail": None,
    "error": {"type": "CrmError", "message": "the CRM answers 503 to every request since the deploy at noon"},
    "started_at": utc("2030-01-01T03:00:01"),
    "finished_at": utc("2030-01-01T03:03:11"),
    "progress": None,
    "retried_as": None,
}


class Terminal(io.StringIO):
    """Standard output of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch):
    """Prints runs as the command does; returns the lines."""

    def print_runs(*runs, columns=None, **environment):
        stream = io.StringIO() if columns is None else Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns or 80, 24)))
            print_rows(runs, Format.TABLE, columns=RUNS.table, titles=True, cells=RUN_CELLS, short=True)
        return stream.getvalue().splitlines()

    return print_runs


def test_a_pipe_gets_everything_and_no_colour(printed):
    head, line = printed(RUN)

    assert head.split() == ["STATE", "ORG", "DEFINITION", "SCHEDULED_FOR", "TOOK", "WHY", "ID"]
    assert "\x1b" not in line
    for part in (
        ID,
        RUN["org"],
        RUN["definition"],
        "2030-01-01T03:00:00Z",
        "3m10s",
        "CrmError: the CRM",
    ):
        assert part in line


@pytest.mark.parametrize("columns", [80, 100, 130, 200])
def test_a_terminal_is_never_wider_than_it_is(printed, columns):
    lines = printed(RUN, {**RUN, "state": "succeeded"}, columns=columns, NO_COLOR="1")

    assert max(map(len, lines)) <= columns
    assert all(line.endswith(ID if columns >= 130 else " 0192aaaa-0000…0001") for line in lines[1:])
    assert all("failed" in line or "succeeded" in line for line in lines[1:])


def test_short_ids_of_a_table_differ(printed):
    alike = {**RUN, "id": ID.replace("8000-00000000", "8000-00000001")}

    lines = printed(RUN, alike, RUN | {"id": ID[:-1] + "2"}, columns=100)

    assert [line.split()[-1] for line in lines[1:]] == [
        "0192aaaa-0000…00001",
        "0192aaaa-0000…10001",
        "0192aaaa-0000…0002",
    ]


def test_a_terminal_has_colour_unless_it_is_refused(printed):
    assert "\x1b[31mfailed" in printed(RUN, columns=100)[1]
    assert "\x1b" not in "".join(printed(RUN, columns=100, NO_COLOR="1"))
    assert "\x1b" not in "".join(printed(RUN, columns=100, TERM="dumb"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "CrmError: the CRM answers 503 to every request since the deploy at noon"),
        ({"retried_as": ID, "error": None}, "retried, an error"),
        ({"state": "succeeded", "reason": None, "error": None}, None),
        (
            {"state": "waiting", "reason": "no_token", "detail": "invalid_client", "available_at": SOON},
            "its org has no token (invalid_client); it is requested again at 2030-01-01T03:04:00.000000Z",
        ),
        (
            {"state": "running", "reason": None, "finished_at": None, "progress": {"done": 3, "total": 10}},
            "it has been running since 2030-01-01T03:00:01.000000Z; 3 of 10 done",
        ),
        (
            {"state": "refused", "reason": "scope_missing", "detail": "read:kb"},
            "its token lacks the scope read:kb",
        ),
    ],
)  # fmt: skip
def test_why_is_the_cause_as_runs_why_says_it_first(changes, words):
    assert why({**RUN, **changes}) == words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (1.26, "1.3s"), (59.9, "59s"), (190, "3m10s"), (7_500, "2h05m"), (93_600, "1d02h")],
)  # fmt: skip
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert took(timedelta(seconds=seconds)) == text
