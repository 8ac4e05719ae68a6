"""A run with children: one bar, those that failed first, and one action that runs them again."""

from __future__ import annotations

import contextlib
import re

import pytest
from playwright.sync_api import expect
from sqlalchemy import insert, select

from tests.fakes.browser import Tab
from tests.fakes.console import Console
from worker.clock import SystemClock
from worker.ids import new_id
from worker.model.runs.children import FamilyCap
from worker.store import tables
from worker.store.database import Database

TOTAL, FAILED = 40, 3


@pytest.fixture
def parent(console: Console) -> str:
    """A run of the history that has succeeded, with 40 children added, of which 3 have failed."""
    runs = tables.runs
    of = {"org": "org_umbrella", "definition": "nightly-digest", "state": "succeeded", "limit": "1"}
    [newest] = console.runs(*(part for name, value in of.items() for part in (f"--{name}", value)))
    database = Database.open(console.url, clock=SystemClock())
    with contextlib.closing(database), database.transaction() as connection:
        row = dict(connection.execute(select(runs).where(runs.c.id == newest["id"])).mappings().one())
        of_parent = {"org_id": row["org_id"], "root_id": row["id"]}
        cap = FamilyCap(row["handler"]).as_json()
        counts = {"run_id": row["id"], "depth": 0, "keep": False, "started": TOTAL, "tree": TOTAL}
        connection.execute(insert(tables.parents).values(cap=cap, **of_parent, **counts))
        for place in range(1, TOTAL + 1):
            own = {"id": new_id(), "origin": "child", "idempotency_key": new_id(), "request_key": None}
            end = {"state": "failed", "reason": "error", "result": None} if place <= FAILED else {}
            connection.execute(insert(runs).values(row | own | end))
            link = {"parent_id": row["id"], "place": place, "run_id": own["id"], "depth": 1}
            key = {"handler": row["handler"], "key": f"page-{place}", "occurrence": 1}
            connection.execute(insert(tables.children).values(**of_parent, **link, **key))
    return str(row["id"])


def test_the_failed_children_of_a_run_are_seen_first_and_run_again(tab: Tab, parent: str):
    tab.go(f"/runs/{parent}")
    card = tab.page.locator("#children")
    expect(card.get_by_role("progressbar", name="Children that have ended")).to_be_visible()
    expect(card).to_contain_text(re.compile(r"40\s+of\s+40\s+have ended,\s+3\s+failed"))
    expect(card.get_by_role("listitem")).to_have_count(FAILED)
    assert tab.violations() == []

    card.get_by_role("listitem").first.get_by_role("link").click()
    expect(tab.page.locator(f'a[href="/runs/{parent}"]').first).to_be_visible()
    tab.page.go_back()
    card.get_by_role("link", name="Show them").click()
    expect(tab.page.get_by_role("searchbox")).to_have_value(f"parent:{parent}")
    tab.page.go_back()

    tab.page.locator("summary", has_text="Retry the failed children").click()
    tab.page.locator("#retry-children").get_by_role("button").click()
    tab.page.wait_for_url(lambda url: "/runs/" in url and parent not in url)

    # It takes up those that have succeeded; its handler starts the others.
    expect(tab.page.locator("#children")).to_contain_text(re.compile(r"37\s+of\s+37\s+have ended"))
