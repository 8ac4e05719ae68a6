"""The documented addresses and roles are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from worker.features.console.api import BASE, Api
from worker.features.console.api.openapi import document
from worker.kit.web.responses import STATUS
from worker.store.lists import BACKFILLS, LISTS
from worker.store.lists.rows import columns_of
from worker.telemetry.alerts import Alert

REFERENCE = (Path(__file__).parents[3] / "docs" / "reference" / "http.md").read_text()
NOTHING: Any = None


def test_every_address_of_the_api_is_documented():
    documented = set(re.findall(r"(?m)^\| `(GET|POST|PATCH|PUT|DELETE) (/[\w/:.]+)`", REFERENCE))
    places = {"run": "ID", "org": "ORG", "name": "NAME", "generation": "GENERATION", "rollout": "ROLLOUT"}
    served = set()
    for route in Api(NOTHING, NOTHING, NOTHING).routes():
        path = re.sub(r"\{(\w+)\}", lambda found: places[found[1]], route.path.removeprefix(BASE))
        served |= {(method, path) for method in route.methods or () if method != "HEAD"}

    assert documented == served


def test_the_parameters_of_every_list_are_documented():
    for listing in LISTS:
        row = re.search(rf"(?m)^\| `GET /{listing.name}` \| ([^|;]*)", REFERENCE)
        assert row is not None
        named = set(row[1].strip().split(", ")) - {""}
        assert named == set(listing.parameters), listing.name


def test_a_table_for_people_has_only_declared_columns():
    computed = {"templates": {"reaches"}, "runs": {"took", "why"}}
    for listing in (*LISTS, BACKFILLS):
        assert set(listing.table) - set(columns_of(listing.row)) == computed.get(listing.name, set()), (
            listing.name
        )


def test_the_status_of_every_error_is_documented():
    documented = {int(status) for status in re.findall(r"\b([45]\d\d)\b", REFERENCE)}

    assert {status for _, status in STATUS} - {500} <= documented


def test_every_member_of_an_alert_is_documented():
    members = set(Alert.__slots__) - {"id", "fields"}

    assert {name for name in members if f"`{name}`" not in REFERENCE} == set()


def test_the_published_schemas_keep_their_names():
    # Clients generate their classes from these; what a class is called here is another matter.
    published = (
        "Attempt Backfill BudgetLevel Bulk BulkRow Change CredentialRow Definition DefinitionDetail "
        "DefinitionState Explanation Handler LogLine MatterRow Org OrgDetail Overview PlannedBackfill "
        "Problem Raise Run RunDetail Skip Spent Step Template Usage Wait"
    )

    assert set(published.split()) <= set(document()["components"]["schemas"])
