"""A command that changes templates or orgs also changes the definitions of all orgs, without a worker."""

from __future__ import annotations

import json

import pytest

from tests.fakes.cli import CommandLine

TEMPLATE = '[[template]]\nname = "daily"\norgs = "all"\nhandler = "acme.note"\nschedule = "{schedule}"\n'
CODES = [f"org_{number}" for number in range(7)]


@pytest.fixture
def site(cli_on_either: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """More orgs than one transaction changes."""
    monkeypatch.setattr("worker.operations.templates.BATCH", 2)
    monkeypatch.setattr("worker.cli.templates.AT_ONCE", 3)
    return cli_on_either


def import_orgs(site: CommandLine, codes: list[str]) -> None:
    lines = [json.dumps({"code": code, "issuer": "main"}) for code in codes]
    site("orgs", "import", "-", stdin="\n".join(lines))


def schedules(site: CommandLine) -> dict[str, str]:
    rows = site("definitions", "list", "--state", "active", "-o", "json").json()
    return {row["org"]: row["schedule"] for row in rows}


def test_templates_reach_every_org(site: CommandLine):
    import_orgs(site, CODES[:4])
    site("apply", "-", stdin=TEMPLATE.format(schedule="@daily"))
    assert schedules(site) == dict.fromkeys(CODES[:4], "@daily")

    import_orgs(site, CODES)
    assert schedules(site) == dict.fromkeys(CODES, "@daily")

    site("apply", "-", "--dry-run", stdin=TEMPLATE.format(schedule="@hourly"))
    assert schedules(site) == dict.fromkeys(CODES, "@daily")
    site("apply", "-", stdin=TEMPLATE.format(schedule="@hourly"))
    assert schedules(site) == dict.fromkeys(CODES, "@hourly")

    site("templates", "close", "daily")
    assert schedules(site) == {}
    template = site("templates", "show", "daily", "-o", "json").json()
    assert (template["orgs_done"], template["orgs_total"]) == (7, 7)


def test_the_audit_names_who_changed_them(site: CommandLine):
    import_orgs(site, CODES)
    site("apply", "-", stdin=TEMPLATE.format(schedule="@daily"))

    rows = site("audit", "list", "--limit", "100", "-o", "json").json()
    made = [row for row in rows if row["action"] == "definition.add"]
    [by] = {row["actor"] for row in rows if row["action"] == "template.add"}
    assert {row["subject"] for row in made} == {f"{code} daily" for code in CODES}
    assert {row["actor"] for row in made} == {by}


def test_a_file_of_known_orgs_adds_only_new_secrets(site: CommandLine):
    orgs = [
        {"code": code, "issuer": "main", "client_id": f"m2m-{code}", "client_secret": f"secret-of-{code}"}
        for code in CODES
    ]
    text = "\n".join(map(json.dumps, orgs))
    first = site("orgs", "import", "-", "-o", "json", stdin=text).json()
    again = site("orgs", "import", "-", "-o", "json", stdin=text).json()
    orgs[0]["client_secret"] = "another-secret"
    rotated = site("orgs", "import", "-", "-o", "json", stdin="\n".join(map(json.dumps, orgs))).json()

    assert first == {"orgs_added": 7, "orgs_changed": 0, "credentials_added": 7}
    assert again == {"orgs_added": 0, "orgs_changed": 0, "credentials_added": 0}
    assert rotated == {"orgs_added": 0, "orgs_changed": 0, "credentials_added": 1}
    generations = site("credentials", "list", "org_0", "-o", "json").json()
    assert [row["generation"] for row in generations] == [2, 1]
