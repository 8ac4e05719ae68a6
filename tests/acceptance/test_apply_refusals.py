"""`apply` refuses what could not run, names entry and field, and changes nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fakes.site import application, definition

GOOD = definition("org_acme", "good", "acme.note", "@daily")

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a bad cron": ({"schedule": "61 * * * *"}, "schedule"),
    "a cron that never fires": ({"schedule": "0 0 31 2 *"}, "schedule"),
    "an unknown zone": ({"timezone": "Europe/Atlantis"}, "timezone"),
    "an unknown handler": ({"handler": "acme.nothing"}, "handler"),
    "an unknown key": ({"shedule": "@daily"}, "shedule"),
    "a bad duration": ({"timeout": "soon"}, "timeout"),
    "a wrong type": ({"max_attempts": "three"}, "max_attempts"),
    "a wrong param type": ({"handler": "http.request", "params": {"url": 5}}, "url"),
    "an unknown param": (
        {"handler": "http.request", "params": {"url": "https://a.example", "metod": "GET"}},
        "metod",
    ),
    "inline without the operator's word": ({"handler": "acme.inline"}, "isolation"),
}


@pytest.fixture(scope="module")
def site(shared_site):
    site = shared_site()
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "before", "acme.note", "@hourly"))
    return site


def state_of(site: Any) -> tuple[Any, ...]:
    return (
        site.query("SELECT * FROM definitions ORDER BY id"),
        site.query("SELECT * FROM definition_revisions ORDER BY definition_id, revision"),
        site.query("SELECT * FROM schedule ORDER BY definition_id"),
        len(site.query("SELECT id FROM audit")),
    )


@pytest.mark.parametrize("case", BAD)
def test_a_bad_definition_is_refused_by_entry_and_field(site, case):
    keys, field = BAD[case]
    bad = definition("org_acme", "bad-one", **{"handler": "acme.note", "schedule": "@daily"} | keys)
    before = state_of(site)

    refused = site.apply(GOOD + bad, "-o", "json", check=False)

    assert refused.code == 78, refused
    message = json.loads(refused.err.strip().splitlines()[-1])["error"]["message"]
    assert "bad-one" in message
    assert field in message
    assert state_of(site) == before


def test_a_dry_run_changes_nothing(site):
    before = state_of(site)

    done = site.apply(GOOD, "--dry-run")

    assert "good" in done.out
    assert state_of(site) == before
