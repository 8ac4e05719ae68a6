"""The prose check finds planted phrases where people read them, and nothing in plain English."""

from __future__ import annotations

from pathlib import Path

from docs.prose import files, main, matches


def phrases(text: str, suffix: str = "") -> list[tuple[int, str]]:
    return [(match.line, match.phrase) for match in matches(text, suffix)]


def test_only_comments_and_strings_of_python_are_checked():
    text = '''"""Whoever asks."""
nobody = anew(instants)  # told of
query = "SELECT instants FROM backfills"
'''

    assert phrases(text, ".py") == [(1, "Whoever"), (2, "told of")]


def test_a_phrase_may_run_over_lines():
    assert phrases("It runs all\nthe same.\n", ".md") == [(1, "all the same")]
    assert phrases("# It runs all\n    # the same.\n", ".py") == [(1, "all the same")]
    assert phrases('say("It runs all "\n    f"the same.")\n', ".py") == [(1, "all the same")]


def test_what_is_generated_and_what_is_quoted_is_left_out():
    page = "<!-- generated: events -->\n| anew |\n<!-- end -->\n<!-- prose: ok -->\n`anew` is a word.\nanew\n"

    assert phrases(page, ".md") == [(6, "anew")]
    assert phrases("-- anew\nSELECT anew\n", ".sql") == [(1, "anew")]


def test_the_command_prints_the_place_and_fails(tmp_path: Path, capsys):
    (tmp_path / "page.md").write_text("Good.\nMade anew.\n")

    code = main([str(tmp_path)])

    assert code == 1
    assert "page.md:2: anew -> again" in capsys.readouterr().out
    (tmp_path / "page.md").write_text("Good.\nMade again.\n")
    assert main([str(tmp_path)]) == 0


def test_the_files_that_people_read_are_checked():
    checked = {
        str(file.relative_to(Path(__file__).parents[2])) for file in files(["worker", "docs", "README.md"])
    }

    assert {"README.md", "docs/index.md", "worker/telemetry/events.py", "worker/app/verbs/runs.py"} <= checked
