"""What is printed: for people, for programs, or ids; and what never gets through."""

from __future__ import annotations

import ast
import json
import re
from datetime import date, timedelta
from pathlib import Path

import pytest

import worker
from tests.fakes.clock import utc
from worker.kit.output import Format, print_error, print_log, print_row, print_rows, say
from worker.telemetry.masking import masker

RUNS = [
    {
        "id": "2",
        "org": "org_b",
        "state": "running",
        "started_at": utc("2030-01-01T00:00:02.5"),
        "detail": None,
    },
    {"id": "1", "org": "org_a", "state": "succeeded", "started_at": None, "detail": "x" * 200},
]
COLUMNS = ("id", "state", "started_at", "detail")


def test_a_table_has_its_columns_aligned_and_long_cells_cut(capsys: pytest.CaptureFixture[str]):
    print_rows(RUNS, Format.TABLE, columns=COLUMNS)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(COLUMNS)
    assert lines[1] == "2   running    2030-01-01T00:00:02Z  -"
    assert lines[2] == "1   succeeded  -                     " + "x" * 79 + "…"


def test_json_is_one_array_of_objects_with_every_key_and_instants_in_utc(capsys: pytest.CaptureFixture[str]):
    print_rows(RUNS, Format.JSON, columns=COLUMNS)

    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [list(row) for row in RUNS]
    assert rows[0]["started_at"] == "2030-01-01T00:00:02.500000Z"
    assert rows[1]["detail"] == "x" * 200


def test_jsonl_is_an_object_a_line_and_id_is_an_id_a_line(capsys: pytest.CaptureFixture[str]):
    print_rows(RUNS, Format.JSONL, columns=COLUMNS)
    print_rows(RUNS, Format.ID, columns=COLUMNS)

    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["id"] for line in lines[:2]] == ["2", "1"]
    assert lines[2:] == ["2", "1"]


def test_an_empty_list_is_an_empty_array_and_for_people_a_word_on_stderr(capsys: pytest.CaptureFixture[str]):
    print_rows([], Format.JSON, columns=COLUMNS)
    print_rows([], Format.TABLE, columns=COLUMNS)

    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert printed.err == "none\n"


def test_a_full_page_says_how_to_go_on(capsys: pytest.CaptureFixture[str]):
    # With the whole id, even if the table has a part of it.
    print_rows(RUNS, Format.TABLE, columns=COLUMNS, limit=2, cells={"id": lambda row: f"short {row['id']}"})

    printed = capsys.readouterr()
    assert printed.err == "there may be more: --after 1\n"
    assert "short 2" in printed.out


def test_one_thing_is_an_object_in_json_and_a_line_a_key_for_people(capsys: pytest.CaptureFixture[str]):
    thing = {
        "id": "1",
        "enabled": True,
        "tags": ["a", "b"],
        "none": [],
        "day": date(2030, 1, 1),
        "wait": timedelta(minutes=90),
        "spec": {"handler": "acme.note"},
        "attempts": [{"attempt": 1, "outcome": "failed"}, {"attempt": 2, "outcome": "succeeded"}],
    }

    print_row(thing, Format.JSON)
    assert json.loads(capsys.readouterr().out) == thing | {"day": "2030-01-01", "wait": "1h30m"}

    print_row(thing, Format.TABLE)
    assert capsys.readouterr().out.splitlines() == [
        "id        1",
        "enabled   yes",
        "tags      a, b",
        "none      -",
        "day       2030-01-01",
        "wait      1h30m",
        "spec",
        "    {",
        '      "handler": "acme.note"',
        "    }",
        "attempts",
        "    attempt  outcome",
        "    1        failed",
        "    2        succeeded",
    ]


def test_what_a_handler_says_cannot_move_the_terminal(capsys: pytest.CaptureFixture[str]):
    hostile = "\x1b[2Jgone\nid  forged"

    print_rows([{"id": hostile}], Format.TABLE, columns=("id",))
    print_row({"id": hostile}, Format.TABLE)
    line = {"at": utc("2030-01-01"), "level": "info", "source": "log", "attempt": 1, "seq": 1}
    print_log([line | {"text": hostile}], Format.TABLE)
    say(hostile)

    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert len(printed.out.splitlines()) == 4
    assert r"\x1b[2Jgone\nid  forged" in printed.out


def test_an_error_is_lines_for_people_and_one_object_for_programs(capsys: pytest.CaptureFixture[str]):
    print_error("not_found", "there is no org x", "`orgs list` names them", Format.TABLE)
    print_error("not_found", "there is no org x", "", Format.JSON)

    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[:2] == ["error: there is no org x", "fix: `orgs list` names them"]
    assert json.loads(lines[2]) == {"error": {"code": "not_found", "message": "there is no org x", "fix": ""}}


@pytest.mark.parametrize("output", [Format.TABLE, Format.JSON])
def test_a_known_secret_is_masked_in_errors(output: Format, capsys: pytest.CaptureFixture[str]):
    masker.register("correct-horse-battery")

    print_error("x", "it said correct-horse-battery", "", output)

    assert "correct-horse-battery" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("called", "variable", "shown"),
    [
        ("/opt/bin/orgworker", "", "orgworker"),
        ("/opt/worker/__main__.py", "ORGWORKER_REQUIRE_COMMAND", "orgworker"),
        # The control: called as a module, a command is named as one.
        ("/opt/worker/__main__.py", "", "python -m worker"),
    ],
)
def test_a_fix_names_the_command_as_it_was_called(
    called: str,
    variable: str,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("sys.argv", [called])
    if variable:
        monkeypatch.setenv(variable, "1")
    print_error(
        "x", "no schema", "run `python -m worker db upgrade`; `python -m worker` alone stays", Format.TABLE
    )

    assert capsys.readouterr().err.splitlines()[1] == (
        f"fix: run `{shown} db upgrade`; `python -m worker` alone stays"
    )


@pytest.mark.parametrize(
    ("called", "shown"), [("orgworker", "orgworker"), ("__main__.py", "python -m worker")]
)
@pytest.mark.parametrize("output", [Format.TABLE, Format.JSON, Format.JSONL])
def test_a_fix_in_a_row_names_the_command_as_it_was_called(
    called: str,
    shown: str,
    output: Format,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("sys.argv", [called])
    fix = {"fix": "`python -m worker orgs check acme`"}
    print_rows([{"id": 1, **fix}], output, columns=("id", "fix"))
    print_row({"id": 1, **fix, "diagnostics": [fix]}, output)
    print_error("x", "wrong", "", output, others=[{"code": "x", "message": "too", **fix}])

    out, err = capsys.readouterr()
    assert (out + err).count(f"`{shown} orgs check acme`") == 4
    assert (out + err).count("orgs check acme") == 4


def test_what_is_not_ours_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A handler may return or keep a `fix` of its own."""
    monkeypatch.setattr("sys.argv", ["orgworker"])
    own = {"fix": "python -m worker runs list"}

    print_row({"result": own, "results": [own]}, Format.JSONL)
    print_row(own, Format.JSONL, verbatim=True)
    # The control: a row of ours.
    print_row(own, Format.JSONL)

    returned, state, ours = map(json.loads, capsys.readouterr().out.splitlines())
    assert (returned["result"], returned["results"], state) == (own, [own], own)
    assert ours == {"fix": "orgworker runs list"}


def test_no_text_of_the_product_names_a_file_of_the_checkout():
    """An installed orgworker has no docs/: its texts name the page."""
    found = [
        f"{path.name}: {node.value[:80]}"
        for path in Path(worker.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"docs/[\w/-]+\.md", node.value)
    ]
    assert found == []
