"""Pages that say what is new: without a reload, while somebody looks, and what they say when it ends."""

from __future__ import annotations

import itertools
import re

import pytest
from playwright.sync_api import Browser, Locator, Request, Route, expect

from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.console import Console

DEFINITION = "/orgs/org_umbrella/definitions/nightly-digest"
SEARCH = "/search?q=org%3Aorg_umbrella%20definition%3Anightly-digest"
# Runs of others end there, too.
MIXED = ("/", "/search", "/orgs/org_umbrella")
SOME = re.compile(r"^[1-9]\d* new$")
PATIENCE = 20_000


def bar(tab: Tab) -> Locator:
    return tab.page.locator(".fresh")


def link(tab: Tab) -> Locator:
    return bar(tab).get_by_role("link")


def streams(tab: Tab) -> list[str]:
    """The streams that the page has asked for."""
    return [url for url in tab.requests if "/live/" in url]


def run_now(console: Console) -> None:
    console.cli("definitions", "run", "org_umbrella", "nightly-digest")


def refuse(tab: Tab, status: int, **headers: str) -> None:
    def answer(route: Route) -> None:
        route.fulfill(status=status, headers=headers, body="")

    tab.page.context.route("**/live/**", answer)


@pytest.mark.parametrize("page", [DEFINITION, SEARCH])
def test_a_run_that_ends_is_new_without_a_reload(console: Console, tab: Tab, page: str):
    tab.go(page)
    expect(bar(tab)).to_contain_text("updated")
    expect(link(tab)).to_have_text("Refresh")
    loads = len(tab.requests) - len(streams(tab))
    run_now(console)

    expect(link(tab)).to_have_text("1 new", timeout=PATIENCE)
    # For those who do not see it, politely.
    expect(bar(tab).get_by_role("status")).to_have_text("1 new", timeout=PATIENCE)
    assert tab.violations() == []
    assert len(tab.requests) - len(streams(tab)) == loads
    assert len(streams(tab)) == 1
    assert tab.path() == page
    link(tab).click()
    expect(link(tab)).to_have_text("Refresh")
    assert tab.path() == page


@pytest.mark.parametrize("page", MIXED)
def test_other_lists_say_it_too(console: Console, tab: Tab, page: str):
    tab.go(page)
    run_now(console)

    expect(link(tab)).to_have_text(SOME, timeout=PATIENCE)
    assert len(streams(tab)) == 1


def test_the_number_is_read_aloud_less_often_than_it_is_shown(tab: Tab):
    """A definition of the demo is due every 3 s."""
    tab.go("/")
    tab.page.evaluate("""() => {
      window.heard = [];
      window.seen = new Set();
      const status = document.querySelector(".fresh [role=status]");
      const link = document.querySelector(".fresh a");
      const watch = (node, note) => new MutationObserver(note).observe(node, {childList: true});
      watch(status, () => heard.push(performance.now()));
      watch(link, () => seen.add(link.textContent));
    }""")
    tab.page.wait_for_function("() => seen.size >= 3 && heard.length >= 1", timeout=PATIENCE)
    heard = tab.page.evaluate("() => heard")

    assert all(later - before >= 9_900 for before, later in itertools.pairwise(heard)), heard


def test_workers_have_a_stream_of_their_own(tab: Tab):
    tab.go("/workers")

    expect(bar(tab)).to_contain_text("updated")
    expect(link(tab)).to_have_text("Refresh")
    assert [url for url in streams(tab) if "/live/workers?" in url] != []


def test_the_age_counts_up_without_the_network(tab: Tab):
    refuse(tab, 204)
    tab.go("/workers")
    expect(bar(tab)).to_contain_text("no longer live")
    asked = len(tab.requests)

    expect(bar(tab)).to_contain_text(re.compile(r"updated [3-9] s ago"), timeout=PATIENCE)
    assert len(tab.requests) == asked


def test_a_stream_that_ends_is_asked_for_again(tab: Tab):
    refuse(tab, 503)
    tab.go(DEFINITION)
    expect(bar(tab)).to_contain_text("no longer live; asking again")
    tab.page.context.unroute_all()

    expect(bar(tab)).not_to_contain_text("no longer live", timeout=PATIENCE)


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "you are logged out"), (429, "too many pages are open; asking again"), (403, "no longer live")],
)
def test_what_was_refused_is_said_beside_the_link(tab: Tab, status: int, says: str):
    refuse(tab, status)
    tab.go(DEFINITION)

    expect(bar(tab)).to_contain_text(says)
    expect(bar(tab).get_by_role("status")).to_contain_text(says, timeout=PATIENCE)
    expect(link(tab)).to_have_text("Refresh")


def test_a_page_out_of_sight_has_no_stream(tab: Tab):
    ended: list[str] = []

    def note(request: Request) -> None:
        ended.append(request.url)

    tab.page.on("requestfailed", note)
    tab.go(DEFINITION)
    tab.page.wait_for_timeout(500)
    assert (len(streams(tab)), ended) == (1, [])
    turn(tab, hidden=True)
    tab.page.wait_for_timeout(500)
    assert ended == streams(tab)

    with tab.page.expect_request("**/live/**"):
        turn(tab, hidden=False)
    # From the same place.
    assert len(streams(tab)) == 2
    assert len(set(streams(tab))) == 1


def turn(tab: Tab, *, hidden: bool) -> None:
    tab.page.evaluate(
        """hidden => {
          Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


@pytest.mark.parametrize("page", [*MIXED, DEFINITION, "/workers"])
def test_without_a_script_there_is_a_link(browser: Browser, console: Console, page: str):
    with browsers.tab(browser, console.base, state=console.state, scripts=False) as tab:
        tab.go(page)
        expect(bar(tab)).to_contain_text("As of")
        shown = bar(tab).locator("time").get_attribute("datetime")
        with tab.page.expect_navigation():
            link(tab).click()

        assert tab.path() == page
        assert bar(tab).locator("time").get_attribute("datetime") != shown
        assert streams(tab) == []
