"""What a stranger meets first: links that open what they name, the menu on a phone, a run's id and log."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.fakes import browser as browsers
from tests.fakes.console import Console

NEXT_STEP = "retry-from-checkpoint"


def run_with_checkpoint(console: Console) -> str:
    rows = console.runs("--org", "org_acme", "--state", "failed")
    shown: list[dict[str, Any]] = [console.cli("runs", "show", row["id"]) for row in rows[:20]]
    return next(str(row["id"]) for row in shown if row["checkpoint"] and not row["retried_as"])


@pytest.mark.parametrize("scripts", [False, True])
def test_a_link_opens_the_confirmation_that_it_names(browser: Browser, console: Console, scripts: bool):
    run = run_with_checkpoint(console)
    with browsers.tab(browser, console.base, state=console.state, scripts=scripts) as tab:
        tab.go(f"/runs/{run}")
        confirmation = tab.page.locator(f"details:has(#{NEXT_STEP})")
        # The control: nothing else has opened it.
        assert confirmation.get_attribute("open") is None

        tab.page.get_by_role("link", name="Retry it from its checkpoint").click()
        expect(confirmation.get_by_label("Reason")).to_be_visible()
        # Also where the address comes from elsewhere.
        tab.go("/search")
        tab.go(f"/runs/{run}#{NEXT_STEP}")
        expect(confirmation.get_by_label("Reason")).to_be_visible()
        # By keyboard, the next stop is what is to be filled in.
        tab.page.keyboard.press("Tab")
        expect(confirmation.get_by_label("Reason")).to_be_focused()
        assert tab.wrongs == []
