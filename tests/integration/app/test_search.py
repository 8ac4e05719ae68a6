"""Searches from the command line: runs and orgs, hints for wrong words, bulk changes, and short ids."""

from __future__ import annotations

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.site import definition


@pytest.fixture
def runs(cli: CommandLine) -> list[str]:
    for code, name in (("org_acme", "Acme GmbH"), ("org_beta", "Beta Ltd")):
        cli("orgs", "add", code, "--name", name, check=False)
        cli("apply", "-", stdin=definition(code, "tick", "acme.note", "0 0 1 1 *", overlap="allow"))
    return [
        cli("definitions", "run", org, "tick", "-o", "id").out.strip() for org in ("org_acme", "org_beta")
    ]


def test_one_line_finds_runs_and_orgs(cli: CommandLine, runs: list[str]):
    acme, _ = runs

    found = cli(
        "runs", "list", "-q", "gmbh state:waiting since:yesterday handler:acme.note", "-o", "json"
    ).json()
    assert (found[0]["id"], found[0]["retried_as"]) == (acme, None)
    assert {row["org"] for row in found} == {"org_acme"}
    assert cli("orgs", "list", "acm", "-o", "json").json()[0]["code"] == "org_acme"
    assert (
        cli("orgs", "list", "-q", "org:gmbh", "-o", "id").out == cli("orgs", "list", "acme", "-o", "id").out
    )
    assert cli("orgs", "list", "--broken").err == "none\n"
    lines = cli(
        "runs", "list", "--state", "waiting,running", "--since", "monday", "-q", "acme"
    ).out.splitlines()
    assert lines[0].split()[-2:] == ["WHY", "ID"]
    assert "due" in lines[1]


def test_a_search_selects_the_runs_to_cancel_and_to_retry(cli: CommandLine, runs: list[str]):
    acme, _ = runs

    dry = cli("runs", "cancel", "-q", "acme", "--dry-run", "-o", "json").json()
    assert acme in [row["id"] for row in dry]
    assert {row["org"] for row in dry} == {"org_acme"}
    done = cli("runs", "cancel", "-q", "acme definition:tick", "-o", "json").json()
    assert (acme, "cancelled") in [(row["id"], row["state"]) for row in done]
    assert {row["org"] for row in done} == {"org_acme"}
    again = cli("runs", "retry", "-q", "acme state:cancelled,failed", "-o", "json").json()
    [first] = [row["id"] for row in again if row["retry_of"] == acme]
    assert cli("runs", "retry", acme, check=False).code == 5
    assert cli("runs", "retry", acme, "--again", "-o", "json").json()["retry_of"] == acme
    assert cli("runs", "why", acme, "-o", "json").json()["retried_as"] != first


def test_the_beginning_of_an_id_names_a_run(cli: CommandLine, runs: list[str]):
    acme, beta = runs

    assert cli("runs", "show", acme[:18], "-o", "id").out.strip() == acme
    assert acme in cli("runs", "why", acme[:18]).out
    assert cli("runs", "list", "-q", beta[:18], "-o", "id").out.strip() == beta
    common = cli("runs", "show", acme[:8], "-o", "json", check=False)
    assert (common.code, "several runs" in common.err) == (2, True)
    assert cli("runs", "show", "00000000-0000-7000", check=False).code == 3
