"""`runs cancel` by filter, as an operator gives it."""

from __future__ import annotations

import json

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.site import definition


@pytest.fixture
def waiting(cli: CommandLine) -> list[str]:
    cli("orgs", "add", "org_a", check=False)
    cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "0 0 1 1 *", overlap="allow"))
    return [cli("definitions", "run", "org_a", "tick", "-o", "id").out.strip() for _ in range(2)]


def test_a_dry_run_lists_and_changes_nothing_then_each_is_cancelled(cli: CommandLine, waiting: list[str]):
    dry = cli("runs", "cancel", "--org", "org_a", "--dry-run", "-o", "json")

    assert [row["id"] for row in dry.json()] == waiting
    assert "2 would be changed" in dry.err

    done = cli("runs", "cancel", "--org", "org_a", "--definition", "tick", "-o", "json")
    assert [(row["id"], row["state"]) for row in done.json()] == [(run, "cancelled") for run in waiting]
    assert "2 cancelled, 0 asked to stop" in done.err
    audited = cli("audit", "list", "--org", "org_a", "--limit", "2", "-o", "json").json()
    assert {row["subject"] for row in audited} == set(waiting)
    assert cli("runs", "cancel", "--org", "org_a", "-o", "json").json() == []


@pytest.mark.parametrize(
    "arguments", [(), ("some-run", "--org", "org_a"), ("--state", "failed"), ("--since", "soon")]
)
def test_what_names_no_runs_or_two_ways_is_a_usage_error_with_a_fix(cli: CommandLine, arguments):
    done = cli("runs", "cancel", *arguments, "-o", "json", check=False)

    assert done.code == 2
    assert json.loads(done.err)["error"]["fix"]
