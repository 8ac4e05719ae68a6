"""Every page is accessible: axe-core's default rules, light and dark, on a desk and on a phone."""

from __future__ import annotations

import hashlib
import itertools
import re

from tests.browser.conftest import FULL
from tests.browser.crawling import crawl
from tests.fakes import browser as browsers
from tests.fakes.browser import AXE, DESKTOP, PHONE, Tab
from tests.fakes.console import Console

# Kinds of pages that the crawl finds at least.
MAX_KNOWN = 16


def test_no_page_has_a_violation(browser, console: Console):
    # How many runs have failed depends on the hour: the pages behind a search are found through this one.
    pages = crawl(console.base, console.state, first=("/", "/search?q=state:failed"))
    assert len(pages) >= MAX_KNOWN
    wrong = []
    with browsers.tab(browser, console.base, state=console.state) as tab:
        for address in (address for each in pages.values() for address in each):
            tab.go(address)
            wrong += [f"{address} {each}" for each in looked_at(tab)]
        assert tab.wrongs == []
    assert wrong == []


def test_what_a_stranger_sees_has_no_violation(browser, console: Console):
    with browsers.tab(browser, console.base) as tab:
        tab.go("/")

        assert looked_at(tab) == []


def test_an_error_has_no_violation(tab: Tab):
    tab.go("/runs/no-such-run")

    assert looked_at(tab) == []


def looked_at(tab: Tab) -> list[str]:
    """What is wrong on this page, on a desk and on a phone, light and dark.

    In the dark only colours are other ones, so the gate looks at these alone; `BROWSER=full` at everything.
    """
    wrong = []
    for size, scheme in itertools.product((DESKTOP, PHONE), ("light", "dark")):
        whole = scheme == "light" or FULL
        if size == PHONE and not whole:
            continue
        tab.page.set_viewport_size({"width": size[0], "height": size[1]})
        tab.page.emulate_media(color_scheme=scheme)
        if tab.overflow() > 0:
            wrong.append(f"{size[0]} {scheme}: {tab.overflow()} px too wide")
        wrong += [f"{size[0]} {scheme}: {each}" for each in tab.violations(colours_only=not whole)]
    return wrong


def test_axe_finds_what_is_wrong(browser, console):
    """The control: a page with faults has violations, and one that is too wide overflows."""
    with browsers.tab(browser, console.base, size=PHONE) as tab:
        tab.page.set_content("<div style='width:900px'><img src='x'><button></button></div>")

        found = " ".join(tab.violations())

        assert {"image-alt", "button-name", "document-title"} <= set(re.findall(r"[a-z]+-[a-z]+", found))
        assert tab.overflow() > 500


def test_axe_is_the_released_file():
    readme = AXE.with_name("README.md").read_text()

    assert hashlib.sha256(AXE.read_bytes()).hexdigest() in readme
