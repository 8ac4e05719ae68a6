"""The prose check finds planted phrases where people read them, and nothing in plain English."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.prose import files, main, matches

# What the style guide rejects, and what it asks for instead.
REJECTED = {
    "Part whichever worker has begun a run, and stop one that does nothing else": (
        "Partition the worker that owns the run; stop an idle one"
    ),
    "Let no definition of a test fire of itself": "Keep test definitions from firing on schedule",
    "Let SQLite's writer do more at once, with an index less": "Batch more SQLite writes; drop an index",
    "Keep the index that the workers before name": "Keep the index used by the previous release",
    "Give what is listed in pages a schedule with a past": "Use past-dated schedules in the paging tests",
    "Seconds that a run without a token waits where the issuer does not say, and at most": (
        "Default and maximum retry delay, in seconds"
    ),
    "none stays that no thread is for": "One pooled connection per thread",
    "No more are on than there are slots": "Concurrency is capped by the number of slots",
    "it is told of what strikes": "Delivers alerts if a webhook is configured",
    "as those find out who ask it": "Tracks connectivity from the outcome of queries",
    "Tries in vain after which that is told": "Failed attempts before a warning",
    "which of most runs nobody does": "Lazy: most runs never await it",
    "nobody passes it but those who ask for health": "Requires authentication, except for health and metrics",
    "a file that is none": "not a database file",
    "the state of a run is another": "a run changed state",
    "spoke no protocol": "sent an invalid message",
    "nothing of it starts": "no runs will start",
    "nothing is called X: it is no id": "X is not a valid id",
    "kept are its attempts and log": "Retained: its attempts and log",
    "say what came; exit 1 if it is no good": "report the result; exit 1 if it is unusable",
    "Stop after so long; else Ctrl-C": "Stop after N seconds (default: run until Ctrl-C)",
    "Ask nothing, as where standard input is no terminal": (
        "Skip confirmation (the default when stdin is not a terminal)"
    ),
    "As --org of the database": "Use the token of a stored org",
    "the token does not hold": "the token is invalid",
    "Let every instant of a range run once more, and print the backfill": (
        "Run every scheduled time in a range again"
    ),
    "issuer main does not answer and is left alone for a while": (
        "issuer main is not responding; pausing requests for 15 s"
    ),
    "needs the operator's word": "must be enabled by the operator",
    "how it shall be": "desired state",
}


def phrases(text: str, suffix: str = "") -> list[tuple[int, str]]:
    return [(match.line, match.phrase) for match in matches(text, suffix)]


@pytest.mark.parametrize("sentence", REJECTED)
def test_a_rejected_sentence_is_found(sentence: str):
    assert matches(f"{sentence}\n")


@pytest.mark.parametrize(
    "sentence",
    [
        *REJECTED.values(),
        "There is no network, and the run is no longer waiting.",
        "Returns the next fire time, or None if the schedule has ended.",
        "The instantaneous rate of `instants` and `told` columns.",
        "`id` is None where there is none.",
    ],
)
def test_plain_english_is_not(sentence: str):
    assert matches(f"{sentence}\n") == []


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

    assert {"README.md", "docs/index.md", "worker/telemetry/events.py", "worker/cli/runs.py"} <= checked
