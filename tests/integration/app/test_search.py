"""Searches from the command line: runs and orgs, hints for wrong words, bulk changes, and short ids."""

from __future__ import annotations

import json
import re

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
    assert cli("orgs", "list", "--broken").err == cli("orgs", "list", "--late").err == "none\n"
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


def test_every_verb_takes_a_short_id(cli: CommandLine, runs: list[str]):
    acme, beta = runs
    short = f"{acme[:13]}..{acme[-12:]}"

    for verb in ("show", "why", "logs"):
        for given in (short, short.replace("..", "…").upper()):
            assert cli("runs", verb, given, "-o", "json").code == 0, verb
    assert cli("runs", "show", short, "-o", "id").out.strip() == acme
    assert cli("runs", "why", short, "--org", "org_beta", check=False).code == 3
    assert cli("runs", "list", "-q", short, "-o", "id").out.strip() == acme
    assert acme in cli("runs", "list", "--after", f"{beta[:13]}…{beta[-12:]}", "-o", "id").out.split()
    assert cli("runs", "answer", short, "approval", "--data", "true", "-o", "id").out.strip() == "approval"
    assert cli("runs", "cancel", short, "-o", "id").out.strip() == acme
    assert cli("runs", "retry", short, "--again", "-o", "json").json()["retry_of"] == acme


def test_runs_that_fit_are_listed(cli: CommandLine, runs: list[str]):
    acme, _ = runs
    # Both were made within a minute.
    common = acme[:8]

    told = cli("runs", "cancel", common, "-o", "json", check=False)
    error = json.loads(told.err)["error"]
    shown = cli("runs", "logs", common, check=False)

    assert (told.code, told.out, error["code"]) == (2, "", "ambiguous")
    assert {"id", "org", "definition", "scheduled_for"} == set(error["candidates"][0])
    [one] = [row for row in error["candidates"] if row["id"] == acme]
    assert (one["org"], one["definition"]) == ("org_acme", "tick")
    lines = shown.err.splitlines()
    assert (shown.code, lines[0].startswith(f"error: several runs fit {common}")) == (2, True)
    assert lines[-1] == "fix: give more of its beginning or its end, or the whole id"
    assert [line.split()[1:3] for line in lines[1:-1]] == [
        [row["org"], row["definition"]] for row in error["candidates"]
    ]
    assert re.fullmatch(r"    [0-9a-f]{8}-[0-9a-f]{4}…[0-9a-f]{4,}  org_.*Z", lines[1])
    # Neither was changed.
    assert {cli("runs", "show", run, "-o", "json").json()["state"] for run in runs} == {"waiting"}
