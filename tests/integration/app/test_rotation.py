"""`credentials rotate --older-than` over HTTP."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import timedelta

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.kinde.server import Kinde
from tests.fakes.pages import ROOT, blocks
from worker.demo.provider import Application
from worker.features.provisioning import fleet
from worker.features.provisioning.provisioning import exclusive
from worker.operations.installation import Ownership
from worker.settings import load
from worker.wiring import open_database

ORGS = 3
ROTATE = ("credentials", "rotate", "--older-than", "0s")


@pytest.fixture
def cli(kinde_cli: CommandLine, kinde: Kinde, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Orgs with applications that have properties; retired ones may be deleted after a moment."""
    monkeypatch.setattr(fleet, "DROPPED", timedelta(seconds=0.5))
    kinde.api.application_properties.update({"plan", "beta"})
    kinde.add_orgs(ORGS)
    with kinde_cli.settings.open("a") as settings:
        settings.write('[provisioning]\noverlap = "0s"\n')
    kinde_cli("orgs", "sync", "--provision")
    for app in applications(kinde):
        app.properties = {"plan": f"of {app.org_code}", "beta": True}
        # As if by hand: no definition needs it.
        app.scopes = ("write:kb",)
    return kinde_cli


def applications(kinde: Kinde) -> list[Application]:
    return [app for n in range(1, ORGS + 1) for app in kinde.applications_of(f"org_{n}")]


def test_the_fleet_moves_to_new_applications(cli: CommandLine, kinde: Kinde) -> None:
    before = {app.org_code: app for app in applications(kinde)}
    planned = json.loads(cli(*ROTATE, "--dry-run", "-o", "json").out)
    assert {row["org"]: row["replaces"] for row in planned} == {
        org: app.client_id for org, app in before.items()
    }
    assert json.loads(cli("credentials", "rotate", "--older-than", "90d", "-o", "json").out) == []
    first = cli(*ROTATE, "--limit", "1", "-o", "json")
    assert "the next call continues" in first.err
    [done] = json.loads(first.out)
    everything = first.out + first.err

    # Those that come last are not older than the first one by now.
    rest = cli(*ROTATE, "--limit", "2", "-o", "jsonl")
    rows = [done, *(json.loads(line) for line in rest.out.splitlines())]
    everything += rest.out + rest.err + cli("audit", "list", "-o", "json").out
    assert {row["org"]: (row["state"], row["replaces"]) for row in rows} == {
        org: ("rotated", app.client_id) for org, app in before.items()
    }
    after = {app.org_code: app for app in applications(kinde)}
    assert {row["org"]: row["client_id"] for row in rows} == {
        org: app.client_id for org, app in after.items()
    }
    assert {org: app.properties for org, app in after.items()} == {
        org: app.properties for org, app in before.items()
    }
    assert {app.scopes for app in after.values()} == {("write:kb",)}
    listed = json.loads(cli("credentials", "list", "-o", "json").out)
    assert sorted(row["state"] for row in listed) == ["active"] * ORGS + ["retired"] * ORGS
    assert not any(app.client_secret in everything for app in [*before.values(), *after.values()])
    assert json.loads(cli("orgs", "sync", "--orphans", "-o", "json").out) == []


def test_the_commands_of_the_page_find_nothing_to_rotate(cli: CommandLine) -> None:
    """Those of docs/secrets.md, on the day on which the applications were made."""
    page = blocks((ROOT / "docs" / "secrets.md").read_text(encoding="utf-8"))
    [block] = [block for block in page if block.marks.get("by") == "test_rotation"]

    for command in block.text.splitlines():
        done = cli(*command.removeprefix("$ python -m worker ").split(), "-o", "json")
        assert json.loads(done.out) == []


def test_what_cannot_be_done_says_why(cli: CommandLine) -> None:
    secret = ("--client-id", "b", "--secret-file", "-")
    wrong = {
        (*ROTATE, "org_1"): "ORG is for one org",
        (*ROTATE, *secret): "--client-id is for one org",
        ("credentials", "rotate", "org_1", *secret, "--overlap", "1h"): "--overlap is for the rotation",
        ("credentials", "rotate", "--dry-run"): "add --older-than",
        ("credentials", "rotate", *secret): "an org is missing",
        ("credentials", "rotate", "org_1"): "--client-id is missing",
        ("credentials", "rotate", "--older-than", "soon"): "--older-than",
    }
    for arguments, text in wrong.items():
        refused = cli(*arguments, check=False)
        assert refused.code == 2 and text in refused.err, (arguments, refused.err)
    with (
        closing(open_database(load(str(cli.settings)))) as database,
        exclusive(Ownership(database, ""), "main"),
    ):
        assert cli(*ROTATE, check=False).code == 75
