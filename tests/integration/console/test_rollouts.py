"""Rollouts in the console and the API: what operators see and change, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from tests.fakes.rows import within
from tests.integration.console.conftest import OURS, TOKENS, Site, csrf_of, logged_in, on_either
from worker.store import rollouts, tables

VALUES: dict[str, Any] = {
    "definitions": "digest",
    "from_handler": "acme.digest",
    "to_handler": "acme.other",
    "orgs": "all",
    "flag": None,
    "steps": ["50%", "100%"],
    "auto": False,
    "watch": {"failed": "+2 points", "score": "0.9x"},
}
NUMBERS = {"metric": "failed", "unit": "points", "effect": 6.1, "at_least": 2.4, "tolerance": 2.0}
SIDES = {"exceeds": True, "orgs_to": 24, "orgs_from": 36, "runs_to": 480, "runs_from": 720}


@pytest.fixture
def rollout(staffed: Site) -> str:
    """A planned rollout with a name that has to be escaped."""
    at = staffed.clock.now()
    within(staffed.database, rollouts.put, "new <b>", VALUES, None, at=at, actor="tester")
    return "/rollouts/new%20%3Cb%3E"


@pytest.mark.feature("rollouts")
@on_either
async def test_an_operator_starts_and_halts_a_rollout_on_its_page(staffed: Site, rollout: str):
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get(rollout)
        csrf = csrf_of(page)
        began = await client.post(f"{rollout}/advance", data={"csrf": csrf, "reason": "try"}, headers=OURS)
        without = await client.post(f"{rollout}/halt", data={"csrf": csrf}, headers=OURS)
        early = await client.post(f"{rollout}/advance", data={"csrf": csrf}, headers=OURS)
        nothing = await client.post(f"{rollout}/explode", data={"csrf": csrf, "reason": "x"}, headers=OURS)
        halted = await client.post(
            f"{rollout}/halt", data={"csrf": csrf, "reason": "a <i>feeling</i>"}, headers=OURS
        )
        after = (await client.get(rollout)).text
        listed = (await client.get("/rollouts")).text

    assert "new &lt;b&gt;" in page.text and "<b>" not in page.text.partition("<main")[2]
    assert (began.status_code, halted.status_code) == (303, 303)
    assert without.status_code == 400 and "needs a reason" in without.text
    assert early.status_code == 409 and "has not shown yet" in early.text
    assert nothing.status_code == 400
    assert "a &lt;i&gt;feeling&lt;/i&gt;" in after and "operator:operator" in after
    assert "50% of orgs" in listed and "halted" in listed


async def test_the_page_has_the_numbers_and_both_curves(staffed: Site, rollout: str):
    at = staffed.clock.now()
    days = [
        {"rollout_id": None, "day": at.date(), "side": side, "sums": {"failed": [480, failed, failed]}}
        for side, failed in (("from", 12), ("to", 48))
    ]
    with staffed.database.transaction() as connection:
        id_ = connection.execute(select(tables.rollouts.c.id)).scalar_one()
        values = {"state": "halted", "step": 1, "step_began_at": at, "began_at": at, "halted_at": at}
        numbers = {"failed": NUMBERS | SIDES}
        values |= {"halted_by": "worker", "verdict": numbers, "evidence": {"metrics": numbers}}
        connection.execute(update(tables.rollouts).values(**values))
        connection.execute(tables.rollout_days.insert(), [day | {"rollout_id": id_} for day in days])
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = (await client.get(rollout)).text

    assert "The numbers of the halt" in page
    assert "6.1 points" in page and "480 to 720" in page
    assert "2.5% old version" in page and "10% new version" in page
    assert 'class="confirm"' not in page


@pytest.mark.feature("rollouts")
@on_either
async def test_the_api_moves_a_rollout_with_a_reason(staffed: Site, rollout: str):
    path = f"/api/v1{rollout}"
    async with staffed.client(TOKENS["operator"]) as client:
        plan = (await client.get(f"{path}/plan")).json()
        began = (await client.post(f"{path}/advance", json={})).json()
        early = await client.post(f"{path}/advance", json={})
        without = await client.post(f"{path}/halt", json={})
        halted = (await client.post(f"{path}/halt", json={"reason": "bad"})).json()
        shown = (await client.get(path)).json()
        listed = (await client.get("/api/v1/rollouts")).json()
        absent = await client.get("/api/v1/rollouts/absent")

    assert [step["step"] for step in plan] == ["50%", "100%"]
    assert (began["state"], began["step"], began["orgs_in_all"]) == ("running", 1, 1)
    assert (early.status_code, without.status_code, absent.status_code) == (409, 400, 404)
    assert (halted["state"], halted["reason"]) == ("halted", "bad")
    assert shown["halted_by"] == "operator:operator"
    assert [one["name"] for one in listed] == ["new <b>"]
