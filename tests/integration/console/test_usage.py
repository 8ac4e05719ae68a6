"""What models cost, in the console and the API, for operators, and for orgs that may see it."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, select

from tests.integration.console.conftest import TOKENS, Site, logged_in, on_either
from worker.ids import new_id
from worker.model.definitions.budgets import MONEY
from worker.model.money import NANO
from worker.store import orgs, tables
from worker.store.dialect import database_now
from worker.store.prices import keep_currency

GPT = "gpt-5-mini"


def charge(site: Site, org: str, model: str, money: int, *, unpriced: int = 0, ago: int = 0) -> None:
    """A thousand tokens of a model that an org's digest used so many days ago, without and with a price."""
    with site.database.transaction() as connection:
        keep_currency(connection, "USD")
        org_id = orgs.require(connection, org)["id"]
        owner = select(tables.definitions.c.id).where(tables.definitions.c.org_id == org_id)
        of = {"definition_id": connection.execute(owner).scalar_one(), "org_id": org_id}
        of |= {"day": (database_now(connection) - timedelta(days=ago)).date()}
        named = {"provider": "openai", "model": model, "kind": "input", "tariff": "standard"}
        sums = {"units": 1000, "money": money, "unpriced": unpriced}
        connection.execute(insert(tables.model_days).values(**of, **named, **sums))
        if money:
            connection.execute(insert(tables.meter_days).values(**of, meter=MONEY, used=money))


def allow(site: Site, org: str, limit: int, used: int) -> None:
    """A budget of money of a month, and what is used of it."""
    with site.database.transaction() as connection:
        at, org_id = database_now(connection), orgs.require(connection, org)["id"]
        budget = {"id": new_id(), "target": new_id(), "org_id": org_id, "meter": MONEY, "per": "month"}
        budget |= {"limit": limit, "at_limit": "wait", "warn_at": 0.8, "created_at": at, "updated_at": at}
        connection.execute(insert(tables.budgets).values(**budget, updated_by="ann"))
        start = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        counter = {"org_id": org_id, "meter": MONEY, "per": "month", "starts_at": start, "used": used}
        connection.execute(insert(tables.meters).values(**counter))


def cells(page: str) -> list[list[str]]:
    """The rows of the table of costs, as text."""
    table = page.partition("Cost of models")[2].partition("</table>")[0]
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in found if row]


@on_either
async def test_operators_see_what_models_cost_by_org_and_model(staffed: Site):
    charge(staffed, "org_a", GPT, 3 * NANO // 2)
    charge(staffed, "org_a", "house <b>", 0, unpriced=1000)
    charge(staffed, "org_b", GPT, NANO // 4, ago=2)
    allow(staffed, "org_a", 2 * NANO, 3 * NANO // 2)
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        by_org = (await client.get("/usage?by=org")).text
        by_model = (await client.get("/usage?by=definition,model")).text
        one = (await client.get("/usage?org=org_a")).text
    async with staffed.client(TOKENS["viewer"]) as client:
        days = await client.get("/api/v1/costs?by=day,org")

    assert [(row[0], row[3], row[4]) for row in cells(by_org)] == [
        ("org_a", "1.50 USD", "◷1,000"),
        ("org_b", "0.25 USD", "0"),
    ]
    assert '<progress value="250000000" max="1500000000"' in by_org
    assert [row[:3] for row in cells(by_model)] == [
        ["org_a", "digest", GPT],
        ["org_a", "digest", "house &lt;b&gt;"],
        ["org_b", "digest", GPT],
    ]
    assert "1.50 USD" in one and "2.00 USD" in one and '<progress value="1500000000" max="2000000000"' in one
    assert "money by day (UTC): 1.5 in all" in one and one.count("<figure") == 1
    assert [(row["org"], row["amount"], row["unpriced"]) for row in days.json()] == [
        ("org_a", "1.50", 1000),
        ("org_b", "0.25", 0),
    ]


@on_either
async def test_an_org_sees_its_own_costs_if_it_may(staffed: Site):
    """Without `[web] org_usage`, the control, it sees neither money nor a budget of it."""
    for org in ("org_a", "org_b"):
        charge(staffed, org, GPT, NANO)
        allow(staffed, org, 4 * NANO, NANO)

    async def seen() -> tuple[str, int, Any]:
        async with logged_in(staffed, staffed.token("org_a")) as client:
            page, costs = await client.get("/usage"), await client.get("/usage?by=org")
        async with staffed.client(staffed.token("org_a")) as client:
            answer = await client.get("/api/v1/costs?by=org,model")
            other = await client.get("/api/v1/costs?org=org_b&by=org")
        assert other.status_code in (403, 404)
        return page.text + costs.text, costs.status_code, answer

    hidden, refused, denied = await seen()
    staffed.org_usage = True
    shown, status, answer = await seen()

    assert (refused, denied.status_code) == (400, 403)
    assert "[web] org_usage" in denied.json()["fix"]
    assert "USD" not in hidden and "money" not in hidden
    assert status == 200 and "4.00 USD" in shown and "money by day" in shown
    [row] = answer.json()
    assert (row["org"], row["model"], row["money"], row["currency"]) == ("org_a", GPT, NANO, "USD")
    assert "org_b" not in shown and 'action="/usage/org_a/raise"' not in shown
