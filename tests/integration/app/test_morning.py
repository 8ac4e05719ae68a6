"""`status` and `failures`: what needs attention, with the command that shows more."""

from __future__ import annotations

import shlex

import pytest

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.site import definition
from tests.fakes.stock import Stock
from worker.model.runs.next_steps import NextStep
from worker.settings import load
from worker.wiring import open_database

HOSTILE = "no file 'x'; touch $(pwned) #"


@pytest.fixture
def site(own_cli: CommandLine) -> CommandLine:
    """An org whose run has failed, with an error that its handler chose."""
    cli = own_cli
    cli("orgs", "add", "org_a")
    cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "0 0 1 1 *"))
    cli("definitions", "run", "org_a", "tick")
    database = open_database(load(str(cli.settings), {}, {}))
    try:
        stock = Stock(database)
        worker = stock.worker(handlers=("acme.note",))
        [run] = stock.admit(worker, offered={"acme.note": None})
        error = {"type": "OSError", "message": HOSTILE, "trace": ""}
        stock.finish(worker, stock.ended(run, "failed", reason="error", error=error, result=None))
    finally:
        database.close()
    return cli


def test_status_is_the_morning_page(site: CommandLine):
    found = site("status", "-o", "json").json()
    [matter] = [row for row in found["matters"] if "OSError" in row["title"]]
    lines = site("status")

    assert matter["level"] == "bad"
    assert matter["about"].startswith("1 run failed in org_a.")
    assert (found["running"], found["ended"]) == (0, {"failed": 1})
    assert "0 running; ended in the last 24 hours: 1 failed" in lines.err
    assert lines.out.splitlines()[1].startswith("bad ")


def test_a_matter_is_data(site: CommandLine):
    """`next` is the command of `verb` and `subject`, which has the names of orgs, too."""
    [matter] = [row for row in site("status", "-o", "json").json()["matters"] if "OSError" in row["title"]]

    subject = matter["subject"]
    assert {"level", "title", "about", "next", "kind", "whose", "since", "subject", "verb"} == matter.keys()
    assert (matter["kind"], matter["verb"]) == ("failed_runs", "search_runs")
    assert (subject["orgs"], matter["since"][-1]) == (["org_a"], "Z")
    assert NextStep(matter["verb"], {"query": subject["query"]}).command == matter["next"]


@on_either
def test_the_next_command_can_be_pasted_and_finds_the_runs(site: CommandLine):
    """A handler chooses the error. The control is the text without quotes, which a shell would run."""
    [matter] = [row for row in site("status", "-o", "json").json()["matters"] if "OSError" in row["title"]]

    words = shlex.split(matter["next"])

    assert words[:3] == ["runs", "list", "-q"]
    assert len(words) == 4
    assert len(site(*words, "-o", "json").json()) == 1
    assert len(shlex.split(f"runs list -q {words[3]}")) > 4


def test_failures_are_listed_by_cause(site: CommandLine):
    [row] = site("failures", "-o", "json").json()

    assert (row["runs"], row["open_runs"], row["open_orgs"], row["state"]) == (1, 1, 1, "failed")
    assert row["message"] == f"OSError: {HOSTILE}"
    [run] = site("runs", "list", "-o", "json").json()
    assert row["run"] == run["id"]
    assert site("failures", "--state", "refused", "-o", "json").json() == []
    site("runs", "retry", run["id"])
    assert site("failures", "-o", "json").json()[0]["open_runs"] == 0
