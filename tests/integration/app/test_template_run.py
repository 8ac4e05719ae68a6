"""`templates run` for every org of a template, and `runs answer` for every run of a search."""

from __future__ import annotations

import pytest

from tests.fakes.cli import CommandLine

TEMPLATE = '[[template]]\nname = "daily"\norgs = "all"\nhandler = "acme.note"\nschedule = "@daily"\n'


@pytest.fixture
def site(own_cli: CommandLine) -> CommandLine:
    """Four orgs with a template; one org and another one's definition are paused."""
    for code in ("org_a", "org_b", "org_c", "org_d"):
        own_cli("orgs", "add", code)
    own_cli("apply", "-", stdin=TEMPLATE)
    own_cli("definitions", "pause", "org_c", "daily")
    own_cli("orgs", "pause", "org_d")
    return own_cli


def runs(site: CommandLine) -> list[str]:
    return sorted(row["org"] for row in site("runs", "list", "-o", "json").json())


def test_each_org_of_a_template_runs_once_for_a_key(site: CommandLine):
    planned = site("templates", "run", "daily", "--dry-run", "-o", "json", check=False)
    assert {row["org"]: row["id"] for row in planned.json()} == dict.fromkeys(
        ("org_a", "org_b", "org_c", "org_d")
    )
    assert runs(site) == []

    done = site("templates", "run", "daily", "--request-key", "k", "-o", "json", check=False)

    rows = {row["org"]: row for row in done.json()}
    assert done.code == 5
    assert "2 runs made" in done.err
    assert "--request-key k" in done.err
    assert [rows[org]["state"] for org in ("org_a", "org_b")] == ["waiting", "waiting"]
    assert rows["org_c"]["left"] == "definition org_c/daily is paused"
    assert "org org_d is paused" in rows["org_d"]["left"]
    assert runs(site) == ["org_a", "org_b"]

    site("definitions", "resume", "org_c", "daily")
    site("orgs", "resume", "org_d")
    again = site("templates", "run", "daily", "--request-key", "k", "-o", "json").json()
    assert {row["org"]: row["id"] for row in again}["org_a"] == rows["org_a"]["id"]
    assert runs(site) == ["org_a", "org_b", "org_c", "org_d"]


def test_without_the_key_of_a_call_its_runs_block_new_ones(site: CommandLine):
    """The control: with a new key each unfinished run stands in the way."""
    site("templates", "run", "daily", "--request-key", "k", check=False)
    before = runs(site)

    again = site("templates", "run", "daily", "-o", "json", check=False)

    assert again.code == 5
    assert all(row["left"] for row in again.json())
    assert runs(site) == before


def test_an_unknown_template_is_not_found(site: CommandLine):
    assert site("templates", "run", "absent", check=False).code == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("approval",),
        ("approval", "--data", "true"),
        ("-q", "org:org_a", "approval"),
        ("01900000-0000-7000-8000-000000000000", "approval", "-q", "org:org_a", "--data", "true"),
    ],
)
def test_an_answer_needs_a_run_or_a_search_and_a_value(site: CommandLine, arguments: tuple[str, ...]):
    done = site("runs", "answer", *arguments, check=False)

    assert done.code == 2
    assert "`runs answer -q 'org:acme' NAME --data true`" in done.err


def test_a_search_that_finds_no_waiting_run_answers_nothing(site: CommandLine):
    done = site("runs", "answer", "-q", "org:org_a", "approval", "--data", "true", "-o", "json")

    assert done.json() == []
    assert "0 answered" in done.err
