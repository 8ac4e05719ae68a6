"""The steps of a run: their time and what they spent, one by one and by name."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.integration.console.conftest import TOKENS, Site, logged_in, make_run, on_either
from worker.features.console.pages.runs import by_name
from worker.ids import ALL_ORGS
from worker.model.definitions.budgets import MONEY
from worker.store import tables
from worker.store.lists import runs, step_spends
from worker.store.prices import keep_currency

STEPS = ("fetch", "model:support", "tool:look_up", "model:support")
SPENDS = (
    *(("llm_tokens", "step:2", 1200), ("llm_tokens", "step:4", 34)),
    # Not of a step, of one that is gone, and of another meter.
    *(("llm_tokens", "1:2", 7), ("llm_tokens", "step:9", 8), ("pages<b>", "step:2", 5)),
)


def stepped(site: Site, org: str = "org_a") -> str:
    run_id = make_run(site, org)
    now = site.clock.now()
    with site.database.transaction() as connection:
        table = tables.runs
        row = connection.execute(select(table).where(table.c.id == run_id)).mappings().one()
        mine = {"run_id": run_id, "org_id": row["org_id"]}
        for seq, name in enumerate(STEPS, 1):
            times = {"started_at": now, "ended_at": now + timedelta(seconds=10 * seq)}
            values: dict[str, Any] = {
                **{"seq": seq, "name": name, "key": None, "occurrence": max(1, seq - 2), "attempt": 1},
                **{"handler": "acme.digest", "fencing_token": 1, "size": 6, "result": "done"},
            }
            connection.execute(insert(tables.steps).values(mine | times | values))
        spends = [
            mine | {"definition_id": row["definition_id"], "meter": meter, "key": key, "amount": n, "at": now}
            for meter, key, n in SPENDS
        ]
        connection.execute(insert(tables.spends), spends)
    return run_id


@on_either
async def test_each_step_has_its_time_and_what_it_spent(staffed: Site) -> None:
    run_id = stepped(staffed)

    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = (await client.get(f"/runs/{run_id}")).text
    shown = (await staffed.get(f"/api/v1/runs/{run_id}", TOKENS["operator"])).json()

    assert [step["spends"] for step in shown["steps"]] == [
        {},
        {"llm_tokens": 1200, "pages<b>": 5},
        {},
        {"llm_tokens": 34},
    ]
    assert {each["meter"]: each["amount"] for each in shown["spends"]}["llm_tokens"] == 1249
    steps = page[page.index('id="steps"') : page.index('id="spends"')]
    assert "<caption" in steps and "Steps by name" in steps
    # Together, and one by one.
    for amount in ("1,234", "1,200", "34"):
        assert f'<span class="number">{amount}</span> <code>llm_tokens</code>' in steps
    assert "pages&lt;b&gt;" in steps and "pages<b>" not in page


@on_either
async def test_an_org_sees_no_money_of_its_runs_and_operators_see_it_in_their_currency(staffed: Site) -> None:
    run_id = stepped(staffed)
    with staffed.database.transaction() as connection:
        keep_currency(connection, "USD")
        of_money = tables.spends.c.meter == "pages<b>"
        values = {"meter": MONEY, "amount": 30_025_000}
        connection.execute(update(tables.spends).where(of_money).values(**values))

    async def seen(token: str) -> tuple[str, Any]:
        async with logged_in(staffed, token) as client:
            page = (await client.get(f"/runs/{run_id}")).text
        return page, (await staffed.get(f"/api/v1/runs/{run_id}", token)).json()

    page, shown = await seen(TOKENS["viewer"])
    theirs, seen_by_org = await seen(staffed.token("org_a"))

    assert page.count("0.030025 USD") == 3 and "30,025,000" not in page
    assert shown["steps"][1]["spends"] == {"llm_tokens": 1200, MONEY: 30_025_000}
    assert seen_by_org["steps"][1]["spends"] == {"llm_tokens": 1200}
    assert [spent["meter"] for spent in seen_by_org["spends"]] == ["llm_tokens"]
    assert MONEY not in theirs and "USD" not in theirs


async def test_a_run_with_many_meters_shows_the_first_of_them_by_step(
    staffed: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_spends, "MAX_METERS", 1)
    run_id = stepped(staffed)

    with staffed.database.transaction() as connection:
        found = runs.run(connection, ALL_ORGS, run_id)

    assert [step["spends"] for step in found["steps"]] == [{}, {"llm_tokens": 1200}, {}, {"llm_tokens": 34}]
    assert len(found["spends"]) == 2


async def test_steps_of_one_name_are_added_up_the_longest_first(staffed: Site) -> None:
    run_id = stepped(staffed)
    with staffed.database.transaction() as connection:
        steps = runs.run(connection, ALL_ORGS, run_id)["steps"]

    assert [(one.name, one.steps, one.took.total_seconds(), dict(one.spends)) for one in by_name(steps)] == [
        ("model:support", 2, 60.0, {"llm_tokens": 1234, "pages<b>": 5}),
        ("tool:look_up", 1, 30.0, {}),
        ("fetch", 1, 10.0, {}),
    ]
    assert by_name(steps[:3]) == []
