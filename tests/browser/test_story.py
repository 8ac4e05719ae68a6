"""Nine o'clock: what ran for Acme last night, why did it fail, run it again. One search, two clicks."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.console import Console
from tests.fakes.site import wait_until

CAUSE = "returned 503"
# How a run's page says that it has ended well; it may take a while on a busy machine.
SUCCEEDED = re.compile("succeeded", re.IGNORECASE)
PATIENCE = 20_000


def failed_runs(console: Console, definition: str) -> list[str]:
    """The failed runs of Acme that were not retried, newest first."""
    rows = console.runs("--org", "org_acme", "--definition", definition, "--state", "failed")
    return [row["id"] for row in rows if row["retried_as"] is None]


def link_to(tab: Tab, run: str) -> Locator:
    """The link to a run on this page."""
    return tab.page.locator(f'main a[href$="/runs/{run}"]').first


def confirm_retry(tab: Tab, summary: str, reason: str) -> None:
    """Open the confirmation, read what it does, give a reason, and retry."""
    details = tab.page.locator("details.confirm", has=tab.page.locator("summary", has_text=summary))
    details.locator("summary").click()
    expect(details).to_contain_text("same scheduled time")
    details.get_by_label("Reason").fill(reason)
    details.get_by_role("button").click()


def run_of(tab: Tab) -> str:
    """The run whose page the tab shows."""
    found = re.search(r"/runs/([0-9a-f-]{36})$", tab.path().partition("#")[0].partition("?")[0])
    assert found is not None, tab.path()
    return found[1]


def reasons(console: Console, run: str) -> list[Any]:
    rows = console.cli("audit", "list", "--org", "org_acme", "--limit", "50")
    return [row["detail"].get("reason") for row in rows if row["subject"] == run]


def test_a_failed_run_of_last_night_is_found_understood_and_run_again(console: Console, tab: Tab):
    run = failed_runs(console, "crm-sync")[0]
    tab.go("/")

    tab.page.get_by_role("searchbox").fill("acme state:failed definition:crm-sync")
    tab.page.keyboard.press("Enter")
    link_to(tab, run).click()

    expect(tab.page.locator("main")).to_contain_text(CAUSE)
    expect(tab.page.locator("main")).to_contain_text("failed")
    confirm_retry(tab, "Retry", "the CRM is back")
    tab.page.wait_for_url(re.compile(f"/runs/(?!{run})"))
    retry = run_of(tab)
    # Live: the page is not loaded again.
    expect(tab.page.locator("h1")).to_contain_text(SUCCEEDED, timeout=PATIENCE)
    assert reasons(console, retry) == ["the CRM is back"]
    tab.go(f"/runs/{run}")
    assert link_to(tab, retry).is_visible()


def test_the_morning_page_leads_to_the_same_run(console: Console, tab: Tab):
    """No search: the cause of the failures, then one of its runs."""
    run = failed_runs(console, "nightly-digest")[0]
    tab.go("/")

    cause = tab.page.locator("main li", has_text="chat endpoint responded with")
    cause.get_by_role("link").first.click()
    link_to(tab, run).click()

    expect(tab.page.locator("main")).to_contain_text("the chat endpoint responded with 402")


def test_the_same_without_javascript(browser: Browser, console: Console):
    run = failed_runs(console, "crm-sync")[0]
    with browsers.tab(browser, console.base, state=console.state, scripts=False) as tab:
        tab.go("/")
        tab.page.get_by_role("searchbox").fill("acme state:failed definition:crm-sync")
        tab.page.get_by_role("button", name="Search").click()
        link_to(tab, run).click()
        confirm_retry(tab, "Retry", "without a script")
        tab.page.wait_for_url(re.compile(f"/runs/(?!{run})"))

        def has_succeeded() -> bool:
            tab.page.reload()
            return "succeeded" in tab.page.locator("h1").inner_text().lower()

        wait_until(has_succeeded, "the retry to succeed")
        assert reasons(console, run_of(tab)) == ["without a script"]
        assert tab.wrongs == []


def test_the_same_by_keyboard_alone(console: Console, tab: Tab):
    run = failed_runs(console, "crm-sync")[0]
    keyboard = tab.page.keyboard
    tab.go("/")

    keyboard.press("/")
    keyboard.type("acme state:failed definition:crm-sync")
    keyboard.press("Enter")
    link_to(tab, run).wait_for()
    tab_to(tab, f'a[href$="/runs/{run}"]')
    keyboard.press("Enter")
    tab.page.locator("details.confirm summary").first.wait_for()
    tab_to(tab, "details.confirm summary")
    keyboard.press("Enter")
    tab_to(tab, 'details.confirm input[name="reason"]')
    keyboard.type("no mouse")
    keyboard.press("Enter")

    tab.page.wait_for_url(re.compile(f"/runs/(?!{run})"))
    assert reasons(console, run_of(tab)) == ["no mouse"]


def tab_to(tab: Tab, selector: str, most: int = 80) -> None:
    """Press Tab until the element has the focus, and shows it."""
    focused = f"() => document.activeElement.matches({selector!r})"
    for _ in range(most):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate(focused):
            outline = tab.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"the focus of {selector} cannot be seen"
            return
    raise AssertionError(f"{most} times Tab do not lead to {selector}")


@pytest.mark.usefixtures("console")
def test_a_retry_from_the_checkpoint_is_watched_live(console: Console, tab: Tab):
    run = failed_runs(console, "nightly-digest")[0]
    tab.go(f"/runs/{run}")

    confirm_retry(tab, "from the checkpoint", "paid the bill")
    tab.page.wait_for_url(re.compile(f"/runs/(?!{run})"))
    loads = len(tab.requests)
    # It continues after the third of seven articles.
    expect(tab.page.locator("#progress")).to_contain_text(re.compile("[4567]"), timeout=PATIENCE)
    expect(tab.page.locator("h1")).to_contain_text(SUCCEEDED, timeout=PATIENCE)

    assert not [url for url in tab.requests[loads:] if "/static/" in url], "the page was loaded again"
    row = console.cli("runs", "show", run_of(tab))
    assert (row["origin"], row["retry_of"], row["result"]["articles"]) == ("retry", run, 7)


def test_failed_runs_are_retried_in_bulk_while_the_page_shows_it(console: Console, tab: Tab):
    """The last story: it leaves no failed run to the others."""
    before = set(failed_runs(console, "crm-sync"))
    tab.go("/search?q=org:org_acme state:failed definition:crm-sync")
    tab.page.get_by_role("link", name="Retry these runs").click()

    tab.page.get_by_label("Reason").fill("the CRM is back")
    tab.page.get_by_role("button", name="Retry all that match").click()

    expect(tab.page.locator("#live h2")).to_contain_text("Retries since")
    if len(before) > 1:  # which depends on the hour
        # One at a time of a definition: the others are named, and can be retried later.
        expect(tab.page.get_by_role("alert")).to_contain_text("not retried")
    done = before - set(failed_runs(console, "crm-sync"))
    assert done
    assert all(reasons(console, retry) == ["the CRM is back"] for retry in retries_of(console, done))


def retries_of(console: Console, runs: set[str]) -> list[str]:
    rows = console.runs("--org", "org_acme", "--limit", "100")
    return [row["id"] for row in rows if row["retry_of"] in runs]
