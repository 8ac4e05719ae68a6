"""What a stranger meets first: links that open what they name, the menu on a phone, a run's id and log."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.crawling import crawl
from tests.fakes import browser as browsers
from tests.fakes.browser import PHONE, Tab
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


def test_the_id_of_a_run_is_copied_and_its_log_saved(browser: Browser, console: Console):
    run = run_with_checkpoint(console)
    with browsers.tab(browser, console.base, state=console.state) as tab:
        tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab.go(f"/runs/{run}")
        copy = tab.page.get_by_role("button", name="Copy id")

        copy.click()
        expect(tab.page.get_by_role("button", name="Copied")).to_be_visible()
        assert tab.page.evaluate("() => navigator.clipboard.readText()") == run
        with tab.page.expect_download() as saving:
            tab.page.get_by_role("link", name="Download").click()
        assert saving.value.suggested_filename == f"run-{run}.log"
        assert "of the knowledge base is summed up\n" in saving.value.path().read_text()
        assert tab.path() == f"/runs/{run}"
        assert tab.wrongs == []


def test_without_a_script_there_is_no_button_and_one_click_selects_the_id(browser: Browser, console: Console):
    run = run_with_checkpoint(console)
    with browsers.tab(browser, console.base, state=console.state, scripts=False) as tab:
        tab.go(f"/runs/{run}")

        assert tab.page.get_by_role("button", name="Copy id").count() == 0
        tab.page.locator(".head code.whole").click()
        # Scripts of pages are off, those of the test are not.
        assert tab.page.evaluate("() => String(getSelection())").strip() == run


# The entry of the menu that is marked, within the part of the menu that shows.
WHERE = """() => {
    const current = document.querySelector('nav.links [aria-current]'), list = current?.closest('ul');
    const box = current?.getBoundingClientRect(), around = list?.getBoundingClientRect();
    return current && {
        text: current.textContent, left: box.left - around.left, right: around.right - box.right,
        top: box.top, width: box.width, hidden: list.scrollWidth - list.clientWidth,
        here: current.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)),
    };
}"""


def current_entry(tab: Tab) -> dict[str, Any]:
    found = tab.page.evaluate(WHERE)
    assert found is not None, tab.path()
    return dict(found)


@pytest.mark.parametrize("scripts", [False, True])
def test_on_a_phone_the_menu_shows_where_one_is(browser: Browser, console: Console, scripts: bool):
    pages = crawl(console.base, console.state, first=("/", "/search?q=state:failed"))
    seen = set()
    with browsers.tab(browser, console.base, state=console.state, size=PHONE, scripts=scripts) as tab:
        for address in (address for each in pages.values() for address in each if "/login" not in address):
            tab.go(address)
            entry = current_entry(tab)
            seen.add(entry["text"])
            assert entry["left"] >= 0, (address, entry)
            assert entry["right"] >= 0, (address, entry)
            assert entry["here"], (address, entry)
            # The control: the menu does not fit, so entries are out of sight.
            assert entry["hidden"] > 100, (address, entry)
            # The others can be reached: it does not stay in their way.
            tab.page.evaluate("() => { document.querySelector('nav.links ul').scrollLeft = 10000; }")
            assert current_entry(tab)["here"], address
        assert tab.wrongs == []
    assert len(seen) >= 10, seen
