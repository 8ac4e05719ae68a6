"""Bulk changes by the API: a dry run, a canary, the next part, and whose runs they reach."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.rows import attempt_row
from tests.integration.console.conftest import TOKENS, Site, make_run
from worker.store import orgs, sweeps

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
API = "/api/v1"


def failed(site: Site, org: str) -> str:
    """A run that has failed."""
    run = make_run(site, org)
    with site.database.transaction() as connection:
        org_id, now = orgs.require(connection, org)["id"], site.database.now(connection)
        sweeps.end_waiting(connection, org_id, [run], state="failed", reason="error")
        connection.execute(attempt_row(run, org_id, now, error_cause="CRM answers 500"))
    return run


async def ask(site: Site, verb: str, token: str, **body: Any) -> Any:
    answer = await site.post(f"{API}/runs:{verb}", token, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_search_is_tried_on_a_few_then_all_are_retried(staffed: Site):
    runs = [failed(staffed, org) for org in ("org_a", "org_b", "org_a", "org_b")]
    token, which = TOKENS["operator"], {"q": 'cause:"CRM answers"', "reason": "CRM is back"}

    dry = await ask(staffed, "retry", token, **which, dry_run=True)
    assert ([row["id"] for row in dry["runs"]], dry["next"], dry["dry_run"]) == (runs, None, True)
    assert {row["retried_as"] for row in dry["runs"]} == {None}
    first = await ask(staffed, "retry", token, **which, canary=1)
    assert ([row["id"] for row in first["runs"]], first["canary"]) == (runs[:1], 1)
    rest = await ask(staffed, "retry", token, **which, after=first["next"])

    assert [row["id"] for row in rest["runs"]] == runs[1:]
    assert rest["next"] is None
    made = [row["retried_as"] for row in (*first["runs"], *rest["runs"])]
    listed = (await staffed.get(f"{API}/runs?q=state:waiting", token)).json()
    assert sorted(row["id"] for row in listed) == sorted(made)
    audit = (await staffed.get(f"{API}/audit?limit=1", TOKENS["admin"])).json()
    assert audit[0]["detail"]["reason"] == "CRM is back"
    assert (await ask(staffed, "retry", token, **which))["runs"] == []


async def test_an_org_reaches_its_own_runs_only(staffed: Site):
    mine, theirs = failed(staffed, "org_a"), failed(staffed, "org_b")

    done = await ask(staffed, "retry", staffed.token("org_a"), q="state:failed")

    assert [row["id"] for row in done["runs"]] == [mine]
    rows = (await staffed.get(f"{API}/runs", TOKENS["viewer"])).json()
    assert {row["id"] for row in rows} == {mine, theirs, done["runs"][0]["retried_as"]}


async def test_waiting_runs_are_cancelled_in_parts(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worker.features.console.callers.STEP", 2)
    token = TOKENS["operator"]
    runs = [make_run(staffed) for _ in range(5)]

    first = await ask(staffed, "cancel", token, q="org:org_a", canary=3)
    rest = await ask(staffed, "cancel", token, q="org:org_a", after=first["next"])

    assert [row["id"] for row in (*first["runs"], *rest["runs"])] == runs
    assert {row["state"] for row in (*first["runs"], *rest["runs"])} == {"cancelled"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"q": "colour:red"}, 400),
        ({"q": "state:running"}, 400),
        ({"q": "x", "canary": 0}, 400),
        ({"q": "x", "after": "nowhere"}, 400),
        ({"q": "x", "reason": ""}, 400),
    ],
)
async def test_what_cannot_be_is_refused(staffed: Site, body: dict[str, Any], status: int):
    answer = await staffed.post(f"{API}/runs:retry", TOKENS["operator"], json=body)

    assert answer.status_code == status
    assert answer.json()["fix"]
    assert (await staffed.post(f"{API}/runs:retry", TOKENS["viewer"], json={"q": "x"})).status_code == 403
