"""Tabs by state and filters as links: by keyboard, without JavaScript, at each width, in light and dark."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.test_story import tab_to
from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.console import Console

ADDRESSES = (
    "/search",
    "/search?q=org_acme state:failed,refused since:7d handler:http.request",
    '/search?q=org:org_acme definition:crm-sync since:7d cause:"a very long cause of a very long kind"',
    "/definitions?state=broken",
    "/orgs?broken=true",
)
# The height and width of each link that a finger has to hit.
SMALL = """() => [...document.querySelectorAll(".tabs a, .narrower a, .offers a, .offers summary")]
    .filter(each => each.checkVisibility())
    .map(each => [each.innerText, each.getBoundingClientRect()])
    .filter(([_, box]) => box.width < 24 || box.height < 24).map(([text]) => text)"""


def searched(tab: Tab) -> str:
    """The whole text of the search."""
    return tab.page.get_by_role("searchbox").input_value()


def test_runs_are_narrowed_and_widened_by_keyboard_without_javascript(browser: Browser, console: Console):
    with browsers.tab(browser, console.base, state=console.state, scripts=False) as tab:
        keyboard = tab.page.keyboard
        tab.go("/search?q=org:org_acme")

        tab_to(tab, '.tabs a[href*="state%3Afailed"]')
        keyboard.press("Enter")
        expect(tab.page.locator('.tabs a[aria-current="page"]')).to_have_text(re.compile(r"Failed \d"))
        assert searched(tab) == "org:org_acme state:failed"
        tab_to(tab, 'td a[title="Only runs of crm-sync"]')
        keyboard.press("Enter")
        assert searched(tab) == "org:org_acme state:failed definition:crm-sync"
        tab_to(tab, ".offers summary")
        keyboard.press("Enter")
        tab_to(tab, '.offers a[href*="cause%3A"]')
        keyboard.press("Enter")
        assert "503" not in searched(tab)
        assert re.search(r' definition:crm-sync cause:".*returned <n>', searched(tab))
        assert tab.page.locator('td a[href^="/runs/"]').count() > 0
        # Each filter is removed by a link of its own, and the rest of the text stays.
        for left in ("state:failed definition:crm-sync", "state:failed"):
            tab_to(tab, '.in-force a[title="Remove this filter"]')
            keyboard.press("Enter")
            tab.page.wait_for_load_state()
            assert left in searched(tab)
        # What is in force already leads to its page.
        tab.go("/search?q=org:org_acme definition:crm-sync")
        tab.page.locator("td a", has_text="crm-sync").first.click()
        assert tab.path() == "/orgs/org_acme/definitions/crm-sync"
        assert tab.wrongs == []


def test_definitions_and_orgs_are_narrowed_to_the_broken_ones(tab: Tab):
    for path, heading in (("/definitions", "Definitions"), ("/orgs", "Broken orgs")):
        tab.go(path)
        link = tab.page.locator(".tabs a", has_text="Broken")
        number = int(re.sub(r"\D", "", link.inner_text()))
        link.click()
        expect(tab.page.locator("h1")).to_have_text(heading)
        assert tab.page.locator("tbody tr").count() == number > 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1024, 1280])
def test_tabs_and_filters_fit_and_can_be_seen_and_hit(
    browser: Browser, console: Console, width: int, dark: bool
):
    size = (width, 900)
    with browsers.tab(browser, console.base, state=console.state, size=size, dark=dark) as tab:
        for address in ADDRESSES:
            tab.go(address)
            for details in tab.page.locator(".offers summary").all():
                details.click()
            assert (tab.overflow(), tab.page.evaluate(SMALL), tab.violations()) == (0, [], []), address
        assert tab.wrongs == []
