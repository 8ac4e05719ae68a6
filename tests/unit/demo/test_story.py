"""The demo's narrator and story: lines with what to do, a summary, and what happens once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest

from worker.demo.journal import QUIET, RunChange
from worker.demo.run import ConsoleLinks, Narrator, Story
from worker.errors import Unavailable

COMMAND = "/tmp/demo/orgworker"
CONSOLE = "http://127.0.0.1:8470"


class FakeJournal:
    """A journal whose changes come from a test."""

    changes: list[RunChange]

    def read(self) -> list[RunChange]:
        changes, self.changes = self.changes, []
        return changes


def narrator_of(clock, journal: FakeJournal) -> Narrator:
    return Narrator(journal, clock, clock.monotonic(), command=COMMAND, console=CONSOLE)


def change(state: str, reason: str | None = None, detail: str | None = None, **values: Any) -> RunChange:
    named = {"run": "01a2", "definition": "support-digest", "handler": "assistant.digest_v2"} | values
    return RunChange(**named, attempt=1, org="org_acme", state=state, reason=reason, detail=detail)


def test_a_dead_secret_prints_what_to_do_once_for_its_org(clock, capsys):
    """Another run of the org has the same cause, even when its line is printed again."""
    journal = FakeJournal()
    narrator = narrator_of(clock, journal)
    for run in ("1", "2"):
        journal.changes = [change("waiting", "no_token", "credentials_rejected: …", run=run)]
        narrator.narrate()
        clock.advance(QUIET)

    printed = capsys.readouterr().out
    assert printed.count("the provider rejects its secret") == 2
    assert printed.count(f"{COMMAND} orgs sync --provision --org org_acme") == 1


def test_each_question_is_printed_with_what_to_do_and_again_on_enter_while_it_is_open(clock, capsys):
    asked = [change("waiting", "answer", "approval", run=run, definition="refund") for run in ("1", "2")]
    journal = FakeJournal()
    narrator = narrator_of(clock, journal)
    journal.changes = asked
    narrator.narrate()
    first = capsys.readouterr().out
    journal.changes = [change("waiting", "resumed", run="1", definition="refund")]
    narrator.narrate()
    capsys.readouterr()

    narrator.say_what_waits()

    again = capsys.readouterr().out
    assert [f"runs answer {run} approval" in first for run in "12"] == [True, True]
    assert [f"runs answer {run} approval" in again for run in "12"] == [False, True]
    assert again.startswith("# refund of org_acme waits for an answer: approval\n")


class FakeDatabase:
    """Fails while it is down; what it stores is of no interest."""

    def __init__(self) -> None:
        self.links = 0
        self.is_down = False

    @contextmanager
    def transaction(self) -> Any:
        if self.is_down:
            raise Unavailable("the database is locked", fix="wait")
        self.links += 1
        yield None


@pytest.mark.feature("console")
def test_enter_prints_one_link_a_second_and_none_if_the_database_is_busy(clock, capsys, monkeypatch):
    monkeypatch.setattr("worker.features.console.operators.sign_in.begin_login", lambda *_, **__: None)
    database = FakeDatabase()
    console = ConsoleLinks("127.0.0.1:8470", database, clock)

    made = [console.say_link() for _ in range(30)]
    clock.advance(1)
    database.is_down = True
    console.say_link()

    first, second = capsys.readouterr().out.splitlines()
    assert (made.count(True), database.links) == (1, 1)
    assert first.startswith(f"# a new link to the console: {CONSOLE}/login/once/")
    assert second == "# no new link: the database is locked; press Enter again"


class FakeInstallation:
    """Writes down what is done to it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def run(self, *arguments: str) -> None:
        self.done.append(" ".join(arguments))

    def kill_worker(self) -> None:
        self.done.append("kill")

    def start_worker(self) -> None:
        self.done.append("start")


@pytest.mark.parametrize(("calls", "words"), [(7, "no call"), (8, "only the call in flight")])
def test_the_story_waits_for_its_moments_and_tells_what_the_kill_cost(clock, capsys, calls, words):
    narrator = narrator_of(clock, FakeJournal())
    installation = FakeInstallation()
    asked = 0
    story = Story(installation, narrator, lambda: asked)

    story.advance()
    assert installation.done == []
    narrator.succeeded.add(("org_globex", "support-digest"))
    story.advance()
    asked = 2
    story.advance()
    assert installation.done == ["definitions run org_globex handbook"]
    asked = 3
    story.advance()
    story.advance()
    assert installation.done[1:] == ["kill", "start"]
    asked = calls
    narrator.succeeded.add(("org_globex", "handbook"))
    story.advance()
    story.advance()

    told = [line for line in capsys.readouterr().out.splitlines() if "handbook" in line]
    assert told == [
        "# kill -9 of the worker, in handbook of org_globex, after 3 model calls",
        f"# handbook of org_globex: {calls} model calls for 7 pages; the kill repeated {words}",
    ]
    story.advance()
    assert installation.done[3:] == ["definitions run org_acme refund", "templates run letters"]
