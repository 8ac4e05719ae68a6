"""The demo's narrator: a line in columns for each change, and once what it means."""

from __future__ import annotations

import re

import pytest

from worker.demo.run import Accident, Change, Narrator

COMMAND = "python -m worker --config /tmp/demo/worker.toml"


class FakeJournal:
    """A journal whose changes come from a test."""

    changes: list[Change]

    def read(self) -> list[Change]:
        changes, self.changes = self.changes, []
        return changes


def tell(clock, journal: FakeJournal, *changes: Change) -> Narrator:
    narrator = Narrator(journal, clock, clock.monotonic(), COMMAND)
    journal.changes = list(changes)
    narrator.narrate()
    return narrator


def change(
    state: str, reason: str | None = None, detail: str | None = None, *, started: bool = True
) -> Change:
    at = "2030-01-01T00:00:00Z" if started else None
    return Change("org_acme", "support-digest", state, reason, detail, "assistant.digest_v2", at, "3f0c")


def test_a_change_is_one_line_in_columns(clock, capsys):
    tell(clock, FakeJournal(), change("waiting", "retry", "two\nlines"))

    [line] = capsys.readouterr().out.splitlines()
    assert re.split(r" {2,}", line) == [
        "2030-01-01T00:00:00.000Z",
        "org_acme",
        "support-digest",
        "waiting",
        "retry",
        "two lines",
    ]


def test_the_first_success_tells_how_long_it_took_and_by_which_agent(clock, capsys):
    journal = FakeJournal()
    narrator = Narrator(journal, clock, clock.monotonic(), COMMAND)
    clock.advance(2.5)
    journal.changes = [change("succeeded"), change("succeeded")]

    narrator.narrate()

    captions = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert captions == [
        "# the first run succeeded 2.5 s after the worker's start",
        "# org_acme: the flag agent-v2 is on: the new agent, assistant.digest_v2, answered",
    ]


def test_a_dead_secret_prints_what_to_do(clock, capsys):
    tell(clock, FakeJournal(), change("waiting", "no_token"))

    printed = capsys.readouterr().out
    assert "credentials add org_acme --client-id 3f0c --secret-file FILE" in printed
    assert f"{COMMAND} orgs sync --provision --org org_acme" in printed


@pytest.mark.parametrize(("started", "words"), [(False, "was not started"), (True, "was started")])
def test_a_refusal_says_whether_the_handler_was_started(clock, capsys, started, words):
    tell(clock, FakeJournal(), change("refused", "org_mismatch", started=started))

    assert f"the handler {words}" in capsys.readouterr().out


def test_the_end_counts_what_came_of_each_org(clock, capsys):
    narrator = tell(clock, FakeJournal(), change("succeeded"), change("succeeded"), change("refused", "x"))
    capsys.readouterr()

    narrator.sum_up()

    assert capsys.readouterr().out == "# org_acme: 1 refused, 2 succeeded\n"


def test_the_end_says_where_an_org_stands_that_no_run_has_ended_for(clock, capsys):
    narrator = tell(clock, FakeJournal(), change("running"), change("waiting", "no_token"))
    capsys.readouterr()

    narrator.sum_up()

    assert capsys.readouterr().out == "# org_acme: still waiting (no_token)\n"


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
def test_the_accident_waits_for_its_moments_and_tells_what_it_cost(clock, capsys, calls, words):
    narrator = Narrator(FakeJournal(), clock, clock.monotonic(), COMMAND)
    installation = FakeInstallation()
    asked = 0
    accident = Accident(installation, narrator, lambda: asked)

    accident.advance()
    assert installation.done == []
    narrator.succeeded.add(("org_globex", "support-digest"))
    accident.advance()
    asked = 2
    accident.advance()
    assert installation.done == ["definitions run org_globex handbook"]
    asked = 3
    accident.advance()
    accident.advance()
    assert installation.done[1:] == ["kill", "start"]
    asked = calls
    narrator.succeeded.add(("org_globex", "handbook"))
    accident.advance()
    accident.advance()

    told = [line for line in capsys.readouterr().out.splitlines() if "handbook" in line]
    assert told == [
        "# kill -9 of the worker, in handbook of org_globex, after 3 model calls",
        f"# handbook of org_globex: {calls} model calls for 7 pages; the kill repeated {words}",
    ]
